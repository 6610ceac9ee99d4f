"""The matching as its two halves: the cost's reference, then the assignment's, problem by problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops.assignment.reference import assignment_reference
from detr_fast.ops.matching_cost.reference import matching_cost_reference
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets


def matching_reference(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets,
    weights: CostWeights,
    extra_cost: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    cost, num_nonfinite = matching_cost_reference(logits, boxes, targets, weights, extra_cost)
    blocks = cost.transpose(1, 2).split(list(targets.num_targets), 2)  # of each image: [L, Q, T]
    queries = [assignment_reference(block, [block.shape[2]] * len(block)) for block in blocks]
    return torch.cat(queries, 1), num_nonfinite
