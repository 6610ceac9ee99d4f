"""The auction on small integer problems that hypothesis draws: solved exactly, also where pairs are forbidden."""

from __future__ import annotations

import operator
from functools import reduce

import pytest
import torch
from torch import Tensor

from detr_fast.ops import AssignmentOutcome, solve_assignment
from ops.assignment_cases import BACKENDS, by_scipy, total

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def integer_problem(draw: st.DrawFn) -> Tensor:
    queries, targets = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    largest = draw(st.sampled_from([1, 3, 1000, 10**9]))
    row = st.lists(st.integers(-largest, largest), min_size=targets, max_size=targets)
    return torch.tensor(draw(st.lists(row, min_size=queries, max_size=queries)), dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100, deadline=None)
@given(cost=integer_problem())
def test_integer_costs_are_solved_exactly(backend: str, cost: Tensor) -> None:
    targets = cost.shape[1]
    report = solve_assignment(cost[None], [targets], method="auction", backend=backend)
    assert total(cost, report.query_of_target[0]) == total(cost, by_scipy(cost[None], [targets])[0])
    bits = reduce(operator.or_, (abs(int(entry)) for entry in cost.flatten()))
    unit = bits & -bits or 1  # the largest power of two that all costs are multiples of, as all totals then are
    assert float(report.dual_gap[0]) < unit, "less than one unit: the proof that it is the optimum"


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100, deadline=None)
@given(cost=integer_problem(), forbidden=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_forbidden_pairs_are_never_matched(backend: str, cost: Tensor, forbidden: list[tuple[int, int]]) -> None:
    for query, target in forbidden:
        cost[query % cost.shape[0], target % cost.shape[1]] = torch.inf
    targets = cost.shape[1]
    report = solve_assignment(cost[None], [targets], method="auction", backend=backend)
    try:
        best = total(cost, by_scipy(cost[None], [targets])[0])
    except ValueError:
        assert report.outcome.tolist() == [AssignmentOutcome.INFEASIBLE]
        assert report.query_of_target.tolist() == [[-1] * targets]
        assert report.dual_gap.tolist() == [torch.inf]
    else:
        assert total(cost, report.query_of_target[0]) == best
