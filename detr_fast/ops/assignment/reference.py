"""The assignment by SciPy, problem by problem on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assignment_reference(cost: Tensor, num_targets: Sequence[int]) -> Tensor:
    # Imported here, because it takes a third of a second that `import detr_fast` should not.
    from scipy.optimize import linear_sum_assignment

    query_of_target = torch.full((cost.shape[0], cost.shape[2]), -1, dtype=torch.int64)  # [P, T]
    # SciPy solves on the host, so that a device is waited for here.
    for problem, (matrix, count) in enumerate(zip(cost.detach().cpu(), num_targets, strict=True)):
        matrix = matrix[:, :count]  # [Q, T]
        check_numbers(matrix, problem)
        try:
            queries, targets = linear_sum_assignment(matrix)
        except ValueError as error:
            raise ValueError(infeasible(problem)) from error
        query_of_target[problem, torch.from_numpy(targets)] = torch.from_numpy(queries)
    return query_of_target.to(cost.device)


def check_numbers(matrix: Tensor, problem: int) -> None:
    """Raises where a cost [Q, T] on the host is NaN or -inf, naming the pair."""
    broken = ~(matrix > -torch.inf)
    if broken.any():
        query, target = torch.nonzero(broken)[0].tolist()
        value = matrix[query, target].item()
        raise ValueError(
            f"cost must be finite or +inf, got {value} in problem {problem} at query {query} and target {target}"
        )


def infeasible(problem: int) -> str:
    return f"cost of problem {problem} is infeasible: +inf forbids every way to match its targets"
