"""The assignment by SciPy, problem by problem on the host; and reports, also by a plain auction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detr_fast.ops.assignment.auction import FloatArray, IntArray, auction
from detr_fast.ops.assignment.report import (
    LARGEST_AUCTION_COST,
    AssignmentOutcome,
    AssignmentReport,
    check_numbers,
    infeasible,
)


def assignment_reference(cost: Tensor, num_targets: Sequence[int]) -> Tensor:
    # Imported here, because it takes a third of a second that `import detr_fast` should not.
    from scipy.optimize import linear_sum_assignment

    query_of_target = torch.full((cost.shape[0], cost.shape[2]), -1, dtype=torch.int64)  # [P, T]
    # SciPy solves on the host, so that a device is waited for here.
    for problem, (matrix, count) in enumerate(zip(cost.detach().double().cpu(), num_targets, strict=True)):
        matrix = matrix[:, :count]  # [Q, T]
        check_numbers(matrix, problem)
        try:
            queries, targets = linear_sum_assignment(matrix)
        except ValueError as error:
            raise ValueError(infeasible(problem)) from error
        query_of_target[problem, torch.from_numpy(targets)] = torch.from_numpy(queries)
    return query_of_target.to(cost.device)


def report_reference(cost: Tensor, num_targets: Sequence[int], *, method: str) -> AssignmentReport:
    problems, _, most = cost.shape
    query_of_target = torch.full((problems, most), -1, dtype=torch.int64)  # [P, T]
    outcome = torch.full((problems,), AssignmentOutcome.SOLVED, dtype=torch.int32)
    dual_gap = torch.zeros(problems, dtype=torch.float64)
    # Both methods solve on the host, so that a device is waited for here.
    for problem, (padded, count) in enumerate(zip(cost.detach().double().cpu().numpy(), num_targets, strict=True)):
        matrix = padded[:, :count]  # [Q, T]
        outcome[problem] = outcome_of(matrix, method)
        if outcome[problem] != AssignmentOutcome.SOLVED:
            dual_gap[problem] = torch.inf
            continue
        rows_are_targets = count < len(matrix)
        wide = matrix.T if rows_are_targets else matrix  # [rows, columns]
        if wide.shape[0] == 0:
            continue
        columns, price = auction(wide) if method == "auction" else shortest_paths(wide)
        dual_gap[problem] = gap(wide, columns, price)
        rows = np.arange(len(columns))
        queries, targets = (columns, rows) if rows_are_targets else (rows, columns)
        query_of_target[problem, torch.from_numpy(targets)] = torch.from_numpy(queries)
    return AssignmentReport(*(found.to(cost.device) for found in (query_of_target, outcome, dual_gap)))


def outcome_of(matrix: FloatArray, method: str) -> AssignmentOutcome:
    from scipy.optimize import linear_sum_assignment

    largest = LARGEST_AUCTION_COST if method == "auction" else np.inf
    sizes = np.where(matrix == np.inf, 0.0, np.abs(matrix))
    if np.any(matrix == -np.inf) or not np.all(sizes <= largest):
        return AssignmentOutcome.INVALID
    try:
        linear_sum_assignment(np.where(matrix == np.inf, np.inf, 0.0))
    except ValueError:
        return AssignmentOutcome.INFEASIBLE
    return AssignmentOutcome.SOLVED


def shortest_paths(cost: FloatArray) -> tuple[IntArray, FloatArray]:
    """Column of each row by SciPy, and prices of columns by Bellman and Ford's shortest paths over exchanges."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    price = np.zeros(cost.shape[1])
    for _ in rows:
        row_price = cost[rows, columns] + price[columns]
        higher = np.maximum(price, (row_price[:, None] - cost).max(axis=0))
        if np.array_equal(higher, price):
            break
        price = higher
    return columns, price


def gap(cost: FloatArray, columns: IntArray, price: FloatArray) -> float:
    """The total less the sum of the dual solution: row prices u, and column prices v of at most 0."""
    v = np.minimum(0.0, price[columns].min() - price)  # [columns]
    slack = cost - v
    rows = np.arange(len(columns))
    free = np.setdiff1d(np.arange(len(price)), columns)
    return float((slack[rows, columns] - slack.min(axis=1)).sum() - v[free].sum())
