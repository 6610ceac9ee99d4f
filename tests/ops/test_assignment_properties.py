"""Small integer problems that hypothesis draws: ties everywhere, and the simplest one that fails is shown."""

from __future__ import annotations

import pytest
import torch

from detr_fast.ops import assignment
from ops.assignment_cases import BACKENDS, by_scipy

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def integer_problem(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    queries, targets = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    row = st.lists(st.integers(-2, 2), min_size=targets, max_size=targets)
    return draw(st.lists(row, min_size=queries, max_size=queries)), targets


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=300, deadline=None)
@given(problem=integer_problem())
def test_hypothesis_finds_no_tie_that_scipy_breaks_otherwise(backend: str, problem: tuple) -> None:
    rows, targets = problem
    cost = torch.tensor([rows], dtype=torch.float32)
    assert torch.equal(assignment(cost, [targets], backend=backend), by_scipy(cost, [targets]))
