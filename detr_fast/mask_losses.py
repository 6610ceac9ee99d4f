"""The losses of matched masks: the part of ``SetCriterion`` that a model with a mask head adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast.data.batch import Target
from detr_fast.ops import mask_loss


def mask_losses(
    pred_masks: Any, targets: Sequence[Target], indices: Sequence[tuple[Tensor, Tensor]], num_boxes: Tensor | float
) -> dict[str, Tensor]:
    """Focal and dice loss of matched masks, at the targets' size, summed and divided by ``num_boxes``.

    Args:
        pred_masks: logits [B, Q, h, w], or what gives those of some queries when it is indexed by (images, queries),
            as ``DetrSegm`` returns in training.
        targets: B dicts with "masks" [T, height, width] bool; an image's size counts even without objects.
        indices: for each image the matched (queries, targets).
        num_boxes: the normaliser of the box losses.

    Returns:
        ``loss_mask`` and ``loss_dice`` (see ``detr_fast.ops.mask_loss``).

    Raises:
        ValueError: a target has no masks, or not one for each of its labels.
    """
    for image, target in enumerate(targets):
        shape = list(target["masks"].shape) if "masks" in target else None
        if shape is None or len(shape) != 3 or shape[0] != len(target["labels"]):
            raise ValueError(f"masks of target {image} must be [{len(target['labels'])}, height, width], got {shape}")
    images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(indices)])
    logits = pred_masks[images, torch.cat([queries for queries, _ in indices])]  # [N, h, w]
    matched = [
        target["masks"][index.to(target["masks"].device)] for target, (_, index) in zip(targets, indices, strict=True)
    ]
    losses = mask_loss(logits, [masks.to(logits.device) for masks in matched])
    return {"loss_mask": losses.mask.sum() / num_boxes, "loss_dice": losses.dice.sum() / num_boxes}
