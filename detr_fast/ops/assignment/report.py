"""What a solution achieved, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

# Beyond it, sums of costs and prices might not be finite. `largest_cost` of csrc/core/auction_start.h.
LARGEST_AUCTION_COST = 1e300


class AssignmentOutcome(IntEnum):
    """How a problem ended; the values of ``AssignmentReport.outcome``, and of Outcome in csrc/core/lsap.h."""

    SOLVED = 0
    INFEASIBLE = 1  # +inf forbids every way to match min(Q, T) pairs
    INVALID = 2  # a cost is NaN or -inf; by auction also where it is larger than 1e300


class AssignmentReport(NamedTuple):
    """The solutions of P problems, and how good each of them is for sure; all on the device of the costs.

    Attributes:
        query_of_target: [P, T] int64, the query of each target, -1 where there is none.
        outcome: [P] int32, an ``AssignmentOutcome`` each. Where it is not SOLVED, all queries are -1.
        dual_gap: [P] float64, at least 0: how far the total may be above the lowest there is, by the prices that the
            solver ended with. ``total - dual_gap`` is a lower bound for every matching of the problem (weak duality,
            up to rounding in float64). +inf where there is no solution.
    """

    query_of_target: Tensor
    outcome: Tensor
    dual_gap: Tensor


def raise_unsolved(report: AssignmentReport, cost: Tensor, num_targets: Sequence[int]) -> Tensor:
    """The queries of a report whose tensors are on the host; raises where a problem is not solved."""
    for problem, outcome in enumerate(report.outcome.tolist()):
        if outcome == AssignmentOutcome.SOLVED:
            continue
        if outcome == AssignmentOutcome.INVALID:
            check_numbers(cost.detach()[problem, :, : num_targets[problem]], problem, LARGEST_AUCTION_COST)
        raise ValueError(infeasible(problem))
    return report.query_of_target


def check_numbers(matrix: Tensor, problem: int, largest: float = torch.inf) -> None:
    """Raises where a cost [Q, T] on the host is NaN, -inf or finite beyond ``largest``, naming the pair."""
    too_large = (matrix.abs() > largest) & (matrix.abs() < torch.inf)
    broken = ~(matrix > -torch.inf) | too_large
    if broken.any():
        query, target = torch.nonzero(broken)[0].tolist()
        allowed = f"at most {largest:g} in size" if too_large[query, target] else "finite or +inf"
        value = matrix[query, target].item()
        raise ValueError(
            f"cost must be {allowed}, got {value} in problem {problem} at query {query} and target {target}"
        )


def infeasible(problem: int) -> str:
    return f"cost of problem {problem} is infeasible: +inf forbids every way to match its targets"
