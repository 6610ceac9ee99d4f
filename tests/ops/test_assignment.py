"""The assignment op: every backend against SciPy, and SciPy against brute force and the dual certificate."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from detr_fast.ops import assignment
from ops.assignment_cases import BACKENDS, KINDS, PLACES, SHAPES, by_scipy, needs_native, random_cost


def dual_gap(cost: np.ndarray, query_of_target: np.ndarray) -> float:
    """How far [Q, T] prices that certify the matching (T <= Q) are from existing; 0 where it is optimal.

    Prices v of queries must be at most 0, and 0 for a free one, with c[q, t] - u[t] - v[q] >= 0, and = 0 on matched
    pairs. The shortest paths over the exchanges of the matching give them, unless an exchange lowers the total.
    """
    targets = np.arange(cost.shape[1])
    price = np.zeros(cost.shape[0])
    for _ in range(cost.shape[1] + 1):
        target_price = cost[query_of_target, targets] - price[query_of_target]
        lower = np.minimum(price, (cost - target_price).min(axis=1))
        free = np.setdiff1d(np.arange(len(price)), query_of_target)
        if free.size and lower[free].min() < -1e-9:
            return float(-lower[free].min())
        if np.allclose(lower, price, rtol=0, atol=1e-12):
            return 0.0
        price = lower
    return float("inf")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_scipy(shape: str, backend: str, device: str, dtype: torch.dtype, kind: str) -> None:
    queries, targets, num_targets = SHAPES[shape]
    cost = random_cost(kind, len(num_targets), queries, targets).to(dtype)
    found = assignment(cost.to(device), num_targets, backend=backend)
    assert found.dtype == torch.int64
    assert found.device.type == device
    assert torch.equal(found.cpu(), by_scipy(cost, num_targets))


@needs_native
def test_indices_equal_scipys_on_many_small_problems() -> None:
    solved = 0
    for _ in range(200):
        queries, targets = int(torch.randint(1, 24, ())), int(torch.randint(1, 28, ()))
        for kind in KINDS:
            num_targets = torch.randint(0, targets + 1, (16,)).tolist()
            cost = random_cost(kind, 16, queries, targets).to(torch.float32)
            assert torch.equal(assignment(cost, num_targets, backend="native"), by_scipy(cost, num_targets)), kind
            solved += 16
    assert solved == 200 * 16 * len(KINDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "targets"), [(5, 3), (4, 4), (3, 5), (6, 1), (1, 4)])
def test_total_is_the_best_of_all_assignments(backend: str, queries: int, targets: int) -> None:
    cost = torch.randn(1, queries, targets, dtype=torch.float64)
    found = assignment(cost, [targets], backend=backend)[0]
    matched = found >= 0
    total = cost[0, found[matched], torch.arange(targets)[matched]].sum()
    wide = cost[0] if queries >= targets else cost[0].T
    best = min(
        sum(wide[row, column].item() for column, row in enumerate(rows))
        for rows in itertools.permutations(range(wide.shape[0]), wide.shape[1])
    )
    assert int(matched.sum()) == min(queries, targets)
    assert found[matched].unique().numel() == int(matched.sum())
    assert total.item() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["uniform", "untrained", "ties"])
def test_dual_certificate(backend: str, kind: str) -> None:
    cost = random_cost(kind, 1, 220, 150)
    found = assignment(cost, [150], backend=backend)[0].numpy()
    assert dual_gap(cost[0].numpy(), found) == 0.0
    swapped = found.copy()
    swapped[:2] = found[1], found[0]
    change = cost[0].numpy()[swapped, np.arange(150)].sum() - cost[0].numpy()[found, np.arange(150)].sum()
    assert kind == "ties" or (change > 0 and dual_gap(cost[0].numpy(), swapped) > 0), (
        "the certificate must be able to fail"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lap_assign500.npz", "lap_assign600.npz", "lap_assign700.npz", "lap_cost_eps.csv.gz"])
def test_published_optima(shared_data: Path, known_answers: dict, backend: str, name: str) -> None:
    path = shared_data / "fixtures" / name
    if path.suffix == ".npz":
        cost = np.load(path)["cost"].astype(np.float64)
    else:
        with gzip.open(path, "rt") as lines:
            cost = np.loadtxt(lines, delimiter=",")
    found = assignment(torch.from_numpy(cost)[None], [cost.shape[1]], backend=backend)[0].numpy()
    matched = found >= 0
    total = cost[found[matched], np.arange(cost.shape[1])[matched]].sum()
    assert total == pytest.approx(known_answers["lap"][name], rel=1e-13)
    np.testing.assert_array_equal(found, by_scipy(torch.from_numpy(cost)[None], [cost.shape[1]])[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_small_optima(known_answers: dict, backend: str) -> None:
    for case in known_answers["lap"]["small"]:
        cost = torch.tensor(case["cost"], dtype=torch.float64)
        found = assignment(cost[None], [cost.shape[1]], backend=backend)[0]
        matched = found >= 0
        assert cost[found[matched], torch.arange(cost.shape[1])[matched]].sum().item() == case["optimum"]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda cost: cost,
    "the solver's own": lambda cost: cost.transpose(1, 2).contiguous().transpose(1, 2),
    "a slice of a wider tensor": lambda cost: torch.cat([cost, cost, cost], dim=2)[:, :, : cost.shape[2]],
    "every second query": lambda cost: cost.repeat_interleave(2, dim=1)[:, ::2],
    "problems innermost": lambda cost: cost.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "requires grad": lambda cost: cost.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(30, 8, [8, 5, 0]), (6, 9, [9, 6, 2])])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_any_strides(backend: str, device: str, shape: tuple[int, int, list[int]], layout: str) -> None:
    queries, targets, num_targets = shape
    cost = torch.rand(3, queries, targets)
    given_cost = LAYOUTS[layout](cost.to(device))
    before = given_cost.detach().clone()
    assert torch.equal(assignment(given_cost, num_targets, backend=backend).cpu(), by_scipy(cost, num_targets))
    assert torch.equal(given_cost, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_cost_for_every_problem(backend: str) -> None:
    cost = torch.rand(1, 12, 5).expand(4, 12, 5)
    assert torch.equal(assignment(cost, [5, 4, 3, 2], backend=backend), by_scipy(cost, [5, 4, 3, 2]))


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_padding_is_not_read(backend: str, device: str) -> None:
    cost = torch.rand(2, 10, 6)
    cost[0, :, 4:] = torch.nan
    cost[1, :, 1:] = -torch.inf
    found = assignment(cost.to(device), [4, 1], backend=backend).cpu()
    assert torch.equal(found, by_scipy(cost, [4, 1]))
    assert (found[0, 4:] == -1).all()


class TestBadInput:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("value", [torch.nan, -torch.inf])
    def test_cost_that_is_no_cost(self, backend: str, value: float) -> None:
        cost = torch.rand(4, 9, 5)
        cost[2, 7, 3] = value
        with pytest.raises(
            ValueError, match=rf"cost must be finite or \+inf, got {value} in problem 2 at query 7 and target 3"
        ):
            assignment(cost, [5, 5, 5, 5], backend=backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("shape", [(6, 3), (3, 3), (3, 5)])
    def test_infeasible(self, backend: str, shape: tuple[int, int]) -> None:
        cost = torch.rand(3, *shape)
        cost[1, -1 if shape[0] <= shape[1] else slice(None), -1 if shape[0] > shape[1] else slice(None)] = torch.inf
        with pytest.raises(ValueError, match=r"cost of problem 1 is infeasible: \+inf forbids every way"):
            assignment(cost, [shape[1]] * 3, backend=backend)

    def test_shape(self) -> None:
        with pytest.raises(ValueError, match=r"cost must be \[P, Q, T\], got \(4, 5\)"):
            assignment(torch.rand(4, 5), [5])

    def test_dtype(self) -> None:
        with pytest.raises(ValueError, match="cost must be float32, float64, bfloat16 or float16, got torch.int64"):
            assignment(torch.zeros(1, 4, 5, dtype=torch.int64), [5])

    def test_number_of_counts(self) -> None:
        with pytest.raises(ValueError, match="num_targets must have one count for each of the 2 problems, got 1"):
            assignment(torch.rand(2, 4, 5), [5])

    @pytest.mark.parametrize("count", [-1, 6])
    def test_count_out_of_range(self, count: int) -> None:
        with pytest.raises(ValueError, match=rf"num_targets\[1\] must be in \[0, 5\], got {count}"):
            assignment(torch.rand(2, 4, 5), [5, count])

    def test_problems_without_queries(self) -> None:
        assert assignment(torch.rand(1, 0, 3), [3]).tolist() == [[-1, -1, -1]]
