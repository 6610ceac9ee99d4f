"""The losses in plain PyTorch, layer by layer; autograd finds the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.boxes import cxcywh_to_xyxy, elementwise_giou, elementwise_iou
from detr_fast.ops.matching_cost.types import PackedTargets
from detr_fast.ops.set_loss.types import ClassLoss, CrossEntropy, Focal


def set_loss_reference(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets,
    query_of_target: Tensor,
    class_loss: ClassLoss,
    num_boxes: Tensor,
) -> tuple[Tensor, Tensor]:
    """[3, L] losses, [2, L] metrics."""
    dtype, device = torch.promote_types(logits[0].dtype, torch.float32), logits[0].device
    num_targets = torch.tensor(list(targets.num_targets), device=device)
    image = torch.arange(len(num_targets), device=device).repeat_interleave(num_targets, output_size=sum(targets[2]))
    columns = []  # of each layer
    for layer_logits, layer_boxes, query in zip(logits, boxes, query_of_target, strict=True):
        x, matched = layer_logits.to(dtype), query >= 0  # [B, Q, classes], [N]
        box, target_box = layer_boxes.to(dtype)[image, query.clamp(min=0)], targets.boxes.detach().to(dtype)  # [N, 4]
        l1 = (box - target_box).abs().sum(-1)
        giou = elementwise_giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(target_box))
        iou = elementwise_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(target_box)).detach()
        # Targets without a query are written behind an image's last query, which is then cut off.
        place = (image, torch.where(matched, query, x.shape[1]))
        absent = x.new_full((x.shape[0], x.shape[1] + 1), -1)  # [B, Q + 1]
        label = absent.long().index_put(place, targets.labels)[:, :-1]
        score = absent.index_put(place, iou)[:, :-1]
        right = (x[image, query.clamp(min=0)].argmax(-1) == targets.labels) & matched
        error = 100 - 100 * right.sum().to(dtype) / matched.sum().clamp(min=1)
        miscounted = (_predicts_object(x, class_loss).sum(1) - num_targets).abs()
        bbox, gap = torch.where(matched, l1, 0).sum() / num_boxes, torch.where(matched, 1 - giou, 0).sum() / num_boxes
        ce = _class_loss(x, label, score, class_loss, num_boxes)
        columns.append(torch.stack((ce, bbox, gap, error, miscounted.to(dtype).mean())))
    losses, metrics = torch.stack(columns, 1).split((3, 2))
    return losses, metrics.detach()


def _class_loss(x: Tensor, label: Tensor, score: Tensor, class_loss: ClassLoss, num_boxes: Tensor) -> Tensor:
    """Of logits [B, Q, classes]; label [B, Q], -1 for none; score [B, Q] the IoU of matched boxes."""
    classes = x.shape[2]
    if isinstance(class_loss, CrossEntropy):
        weight = class_loss.weights(classes, x)
        return F.cross_entropy(x.flatten(0, 1), torch.where(label < 0, classes - 1, label).flatten(), weight)
    alpha, gamma = class_loss
    present = (label[..., None] == torch.arange(classes, device=x.device)).to(x.dtype)
    p = x.sigmoid()
    if isinstance(class_loss, Focal):
        goal = present
        weight = alpha * present * (1 - p) ** gamma + (1 - alpha) * (1 - present) * p**gamma
    else:
        goal = present * score[..., None]
        weight = goal + alpha * (1 - present) * p.detach() ** gamma
    return (weight * F.binary_cross_entropy_with_logits(x, goal, reduction="none")).sum() / num_boxes


def _predicts_object(x: Tensor, class_loss: ClassLoss) -> Tensor:
    """[B, Q]."""
    return x.argmax(-1) != x.shape[2] - 1 if isinstance(class_loss, CrossEntropy) else x.amax(-1) > 0
