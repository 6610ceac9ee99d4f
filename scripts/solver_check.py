"""Small problems of every kind through the solver and the matching, for compute-sanitizer to watch: cpu or cuda."""

from __future__ import annotations

import sys

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from detr_fast.ops import CostWeights, PackedTargets, assignment, matching


def check_assignment(device: str) -> None:
    """Ragged, empty, square and tied problems, held to SciPy."""
    torch.manual_seed(0)
    for queries, counts in (
        (1, [1, 0]),
        (7, [7, 3, 0, 1]),
        (33, [33, 32, 5]),
        (100, [7, 64, 0, 100]),
        (300, [20, 100]),
    ):
        cost = torch.randint(0, 9, (len(counts), queries, max(counts))).float()
        cost[0] += torch.rand_like(cost[0])
        found = assignment(cost.to(device), counts).cpu()
        for problem, count in enumerate(counts):
            rows, columns = linear_sum_assignment(cost[problem, :, :count].numpy())
            np.testing.assert_array_equal(found[problem, columns].numpy(), rows)


def check_matching(device: str) -> None:
    """Against the reference: two layers of three images, one of them without targets, one query that is no number."""
    torch.manual_seed(0)
    logits = [torch.randn(3, 50, 21, device=device) for _ in range(2)]
    logits[1][0, 3] = float("nan")
    boxes = [0.2 + 0.3 * torch.rand(3, 50, 4, device=device) for _ in range(2)]
    targets = PackedTargets(
        torch.randint(20, (17,), device=device), 0.2 + 0.3 * torch.rand(17, 4, device=device), [12, 0, 5]
    )
    found = matching(logits, boxes, targets, CostWeights(1, 5, 2)).query_of_target
    expected = matching(logits, boxes, targets, CostWeights(1, 5, 2), backend="reference").query_of_target
    torch.testing.assert_close(found, expected)


if __name__ == "__main__":
    where = sys.argv[1]
    check_assignment(where)
    check_matching(where)
    print("right")
