"""Matching and losses as the two ops that they are, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops.matching.api import matching
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets, PaddedTargets
from detr_fast.ops.set_loss.api import stacked_losses
from detr_fast.ops.set_loss.types import ClassLoss


def set_criterion_composed(
    logits: list[Tensor],
    boxes: list[Tensor],
    targets: PackedTargets | PaddedTargets,
    weights: CostWeights,
    extra_cost: Sequence[Tensor] | None,
    class_loss: ClassLoss,
    num_boxes: Tensor,
    backend: str | None = None,
    *,
    singly: bool = False,
) -> tuple[Tensor, ...]:
    """Losses, metrics, ``query_of_target``, ``num_nonfinite``, and single losses, by ``backend`` of both ops."""
    with torch.no_grad():
        query_of_target, num_nonfinite = matching(
            logits, boxes, targets, weights, extra_cost=extra_cost, backend=backend
        )
    losses, metrics, *singles = stacked_losses(
        logits, boxes, targets, query_of_target, class_loss, num_boxes, backend, singly=singly
    )
    return losses, metrics, query_of_target, num_nonfinite, *singles
