"""The auction against shortest paths, the default: large problems, one at a time, on one thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import costs, where
from benchmarks.bench_assignment import Race
from benchmarks.harness import Contest, Contestant
from detr_fast.ops import AssignmentReport, assignment, solve_assignment
from detr_fast.ops.assignment.api import OP

METHODS = ("shortest_path", "auction")
# (Q, T)
SQUARES = ((200, 200), (500, 500), (1000, 1000), (2000, 2000))
RECTANGLES = ((1000, 900), (2000, 1000), (2000, 300))


def hundred_integers(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """Integers from 1 to 100, as OR-Library's: ties everywhere."""
    return torch.randint(1, 101, (targets, queries), generator=generator).float()


def million_integers(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """Integers below a million."""
    return torch.randint(0, 1_000_000, (targets, queries), generator=generator).float()


def distances(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """Between points in the unit square."""
    return torch.cdist(torch.rand(targets, 2, generator=generator), torch.rand(queries, 2, generator=generator))


def products(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """Of a number of the target and one of the query: every row wants the same columns."""
    return torch.rand(targets, 1, generator=generator) * torch.rand(1, queries, generator=generator)


KINDS = (costs.uniform, hundred_integers, million_integers, costs.alike, distances, products)
CASES = [(kind, *size) for size in SQUARES for kind in KINDS if (kind, size) != (products, (2000, 2000))]  # seconds
CASES += [(kind, *size) for size in RECTANGLES for kind in (costs.uniform, costs.alike)]
MARKED = [pytest.param(*case, marks=[pytest.mark.large] * (case[1] >= 1000)) for case in CASES]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "queries", "targets"), MARKED, ids=lambda of: getattr(of, "__name__", of))
def test_auction(race: Race, kind: Callable[..., Tensor], queries: int, targets: int, method: str) -> None:
    reason = (
        "the auction has no kernel for a GPU" if where.device().type == "cuda" else OP.reasons(where.device())["native"]
    )
    if reason is not None:
        pytest.skip(reason)
    race(f"auction {kind.__name__} {queries}x{targets}", method, lambda: contest(kind, queries, targets))


def contest(kind: Callable[..., Tensor], queries: int, targets: int) -> Contest:
    cost = kind(targets, queries, torch.Generator().manual_seed(0)).T[None]  # [1, Q, T]
    report = solve_assignment(cost, [targets])
    contestants = [Contestant(m, lambda m=m: assignment(cost, [targets], method=m)) for m in METHODS]
    return Contest(contestants, lambda found: check(found[0], cost[0], report))


def check(found: Tensor, cost: Tensor, report: AssignmentReport) -> None:
    """Raise unless the total is the proven optimum's; float32 costs have sums in float64 that are nearly exact."""
    targets = torch.arange(cost.shape[1])
    total, lowest = (cost[query, targets].double().sum() for query in (found, report.query_of_target[0]))
    torch.testing.assert_close(total, lowest, rtol=1e-12, atol=1e-12)
    assert len(found.unique()) == len(targets)
