"""Assignment problems on which a solver may go wrong, and what SciPy makes of them."""

from __future__ import annotations

import os

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_fast.ops import _native

NATIVE = _native.load()
if NATIVE.module is None and os.environ.get("CI"):
    pytest.fail(f"continuous integration has a compiler, but {NATIVE.why_not}", pytrace=False)

needs_native = pytest.mark.skipif(NATIVE.module is None, reason=str(NATIVE.why_not))
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or NATIVE.module is None or NATIVE.module.cuda is None,
    reason="needs a GPU and the native module with CUDA",
)
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
PLACES = [("reference", "cpu"), pytest.param("native", "cpu", marks=needs_native)]
PLACES += [("native", "cuda")] if torch.cuda.is_available() else []

# (Q, T, counts): the shapes that break solvers, and one real size.
SHAPES = {
    "one query": (1, 3, [0, 1, 2, 3]),
    "one target": (7, 1, [1, 0, 1]),
    "no targets in one problem": (10, 4, [4, 0, 2]),
    "no targets at all": (10, 4, [0, 0]),
    "no room for targets": (10, 0, [0, 0]),
    "no problems": (10, 4, []),
    "as many targets as queries": (9, 9, [9, 8, 9]),
    "more targets than queries": (5, 12, [12, 6, 5, 4]),
    "not a multiple of a warp": (33, 31, [31, 17]),
    "DETR": (100, 20, [7, 20, 3, 0, 11, 1]),
    "crowded": (300, 100, [100, 99]),
}


def random_cost(kind: str, problems: int, queries: int, targets: int) -> Tensor:
    """[P, Q, T] float64 costs of a kind on which a solver may go wrong."""
    shape = (problems, queries, targets)
    if kind == "uniform":
        return torch.rand(shape, dtype=torch.float64)
    if kind == "ties":
        return torch.randint(0, int(torch.randint(2, 6, ())), shape).double()
    if kind == "untrained":  # all queries look alike
        queries_alike = torch.rand(problems, queries, 1) + torch.rand(problems, 1, targets)
        return queries_alike.double() + 0.01 * torch.rand(shape, dtype=torch.float64)
    if kind == "duplicated targets":
        return torch.rand(shape, dtype=torch.float64)[:, :, torch.randint(0, max(targets, 1), (targets,))]
    if kind == "duplicated queries":
        return torch.rand(shape, dtype=torch.float64)[:, torch.randint(0, queries, (queries,))]
    if kind == "forbidden pairs":
        cost = torch.rand(shape, dtype=torch.float64)
        cost[torch.rand(shape) < 0.2] = torch.inf
        pairs = torch.arange(min(queries, targets))
        cost[:, pairs, pairs] = 1.0  # leaves one way to match
        return cost
    raise AssertionError(kind)


KINDS = ["uniform", "ties", "untrained", "duplicated targets", "duplicated queries", "forbidden pairs"]


def by_scipy(cost: Tensor, num_targets: list[int]) -> Tensor:
    """What the op must return, straight from SciPy."""
    expected = torch.full((cost.shape[0], cost.shape[2]), -1)
    for problem, count in enumerate(num_targets):
        queries, targets = linear_sum_assignment(cost[problem, :, :count].double().cpu().numpy())
        expected[problem, targets] = torch.from_numpy(queries)
    return expected


def total(cost: Tensor, query_of_target: Tensor) -> float:
    """Sum of the matched costs [Q, T] in float64; fails where a query is given twice."""
    matched = query_of_target >= 0
    queries = query_of_target[matched]
    assert queries.unique().numel() == queries.numel()
    return float(cost.double()[queries, torch.arange(cost.shape[1])[matched]].sum())
