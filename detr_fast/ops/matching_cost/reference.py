"""The matching cost in plain PyTorch, image by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops.boxes import cxcywh_to_xyxy, pairwise_giou
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets

# Costs of this magnitude and beyond, and those that are no numbers, are treated alike.
LARGEST_COST = 1e30


def matching_cost_reference(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets,
    weights: CostWeights,
    extra_cost: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    all_logits = torch.stack(list(logits)).to(_dtype(logits[0]))  # [L, B, Q, classes]
    all_boxes = torch.stack(list(boxes)).to(all_logits.dtype)
    costs = [all_logits.new_empty((len(logits), 0, all_logits.shape[2]))]
    labels = targets.labels.split(list(targets.num_targets))
    target_boxes = targets.boxes.to(all_logits.dtype).split(list(targets.num_targets))
    for image, (image_labels, image_boxes) in enumerate(zip(labels, target_boxes, strict=True)):
        class_term = _class_term(all_logits[:, image], image_labels, weights)  # [L, T, Q]
        query_boxes = all_boxes[:, image]  # [L, Q, 4]
        l1 = (image_boxes[:, None] - query_boxes[:, None]).abs().sum(-1)
        giou = pairwise_giou(cxcywh_to_xyxy(image_boxes), cxcywh_to_xyxy(query_boxes))
        costs.append(weights.cost_class * class_term + weights.cost_bbox * l1 - weights.cost_giou * giou)
    cost = torch.cat(costs, dim=1)  # [L, N, Q]
    if extra_cost is not None:
        cost = cost + torch.stack(list(extra_cost)).to(cost.dtype)
    return _replace_unusable(cost, targets.num_targets)


def _class_term(logits: Tensor, labels: Tensor, weights: CostWeights) -> Tensor:
    """[L, Q, classes] and [T] to [L, T, Q]."""
    if not weights.focal:
        return -logits.softmax(-1)[..., labels].transpose(1, 2)
    p = logits[..., labels].sigmoid().transpose(1, 2)
    there = -weights.alpha * (1 - p) ** weights.gamma * (p + 1e-8).log()
    absent = -(1 - weights.alpha) * p**weights.gamma * (1 - p + 1e-8).log()
    return there - absent


def _replace_unusable(cost: Tensor, num_targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Costs that are no numbers become, image by image, one that no matching takes if it can do otherwise."""
    unusable = ~(cost.abs() < LARGEST_COST)
    usable_cost = cost.masked_fill(unusable, 0)
    blocks, counts = [], []
    for block, bad in zip(usable_cost.split(list(num_targets), 1), unusable.split(list(num_targets), 1), strict=True):
        pairs = min(block.shape[1:]) + 1
        flat = torch.nn.functional.pad(block.flatten(1), (0, 1))  # [L, T * Q + 1]: an image may have no targets
        lowest, highest = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
        penalty = highest + (highest - lowest + 1) * pairs  # [L]: more than all pairs of any matching can differ by
        blocks.append(torch.where(bad, penalty[:, None, None], block))
        counts.append(bad.sum((1, 2)))
    return torch.cat(blocks, 1), torch.stack(counts, 1)  # [L, N, Q], [L, B]


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
