"""The comparison with SciPy over random problems: a small part of it, and that it sees what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import exactness
from detr_fast.ops import assignment


def test_every_kind_of_problem_has_scipys_indices() -> None:
    seed = torch.initial_seed() % 2**31
    report = exactness.run(1500, seed)
    assert len(report.tallies) == 8
    for kind, tally in report.tallies.items():
        assert tally.problems > 100, kind
        # Sums of decimals tie or do not tie by the order of their terms, so that another choice can be as good.
        allowed = 2 if kind == "decimals" else 0
        assert tally.problems - tally.same_indices <= allowed, f"{kind}: {tally}"
        assert tally.worst_excess < 1e-13


def test_large_problems_are_proven_optimal() -> None:
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    report = exactness.Report({kind.__name__: exactness.Tally() for kind in exactness.KINDS})
    for kind in exactness.KINDS[:2]:
        exactness.compare(report, kind, 1100, [150], assignment, generator, certify=True)
        tally = report.tallies[kind.__name__]
        assert (tally.problems, tally.same_indices, tally.proven) == (1, 1, 1)
        assert abs(tally.worst_gap) < 1e-12


def test_a_wrong_solver_is_seen() -> None:
    def swapped(cost, counts):
        found = assignment(cost, counts)
        return torch.cat([found[:, 1:2], found[:, :1], found[:, 2:]], 1)

    report = exactness.run(300, 0, swapped)
    tally = report.tallies["uniform"]
    assert tally.same_indices < tally.problems
    assert tally.same_total + tally.lower_total < tally.problems - tally.same_indices
    assert tally.worst_excess > 1e-3


def test_the_gap_is_that_of_the_matching() -> None:
    cost = np.array([[1.0, 2.0, 9.0], [1.0, 4.0, 9.0]])
    assert exactness.duality_gap(cost, np.array([1, 0])) == pytest.approx(0, abs=1e-15)
    assert exactness.duality_gap(cost, np.array([0, 1])) >= 2
