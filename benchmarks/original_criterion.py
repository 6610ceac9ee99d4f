"""The original DETR's way of computing losses, re-created from its description: a contestant and nothing else.

Layer by layer and loss by loss, with indices on the host, a GIoU of all matched boxes with all targets of which the
diagonal is used, checks of boxes that read values, and a normaliser that is a Python number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.original import Matches, corners, giou_of_all_pairs, match

Layer = dict[str, Tensor]
Targets = Sequence[dict[str, Tensor]]


def losses_of_layers(layers: Sequence[Layer], targets: Targets, class_weight: Tensor) -> dict[str, Tensor]:
    """All losses of all layers, the last of which is the final one and has no number."""
    final, earlier = layers[-1], layers[:-1]
    matches = matched_without_gradient(final, targets)
    count = torch.as_tensor([sum(len(target["labels"]) for target in targets)], dtype=torch.float)
    num_boxes = count.clamp(min=1).item()
    losses = losses_of(final, targets, matches, num_boxes, class_weight)
    losses["class_error"] = class_error(final, targets, matches)
    for number, layer in enumerate(earlier):
        found = losses_of(layer, targets, matched_without_gradient(layer, targets), num_boxes, class_weight)
        losses.update({f"{name}_{number}": value for name, value in found.items()})
    return losses


@torch.no_grad()
def matched_without_gradient(layer: Layer, targets: Targets) -> Matches:
    return match(layer, targets)


def losses_of(
    layer: Layer, targets: Targets, matches: Matches, num_boxes: float, class_weight: Tensor
) -> dict[str, Tensor]:
    return {
        "loss_ce": cross_entropy(layer, targets, matches, class_weight),
        **box_losses(layer, targets, matches, num_boxes),
        "cardinality_error": cardinality_error(layer, targets),
    }


def places(matches: Matches) -> tuple[Tensor, Tensor]:
    """(image, query) of every matched pair."""
    images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(matches)])
    return images, torch.cat([queries for queries, _ in matches])


def matched(targets: Targets, key: str, matches: Matches) -> Tensor:
    return torch.cat([target[key][chosen] for target, (_, chosen) in zip(targets, matches, strict=True)])


def cross_entropy(layer: Layer, targets: Targets, matches: Matches, class_weight: Tensor) -> Tensor:
    logits = layer["pred_logits"]
    classes = torch.full(logits.shape[:2], logits.shape[-1] - 1, dtype=torch.int64, device=logits.device)
    classes[places(matches)] = matched(targets, "labels", matches)
    return F.cross_entropy(logits.transpose(1, 2), classes, class_weight)


@torch.no_grad()
def class_error(layer: Layer, targets: Targets, matches: Matches) -> Tensor:
    logits, labels = layer["pred_logits"][places(matches)], matched(targets, "labels", matches)
    if labels.numel() == 0:
        return torch.tensor(100.0)
    best = logits.topk(1, 1)[1].t()
    right = best.eq(labels.view(1, -1).expand_as(best)).view(-1).float().sum(0)
    return 100 - right * (100.0 / len(labels))


@torch.no_grad()
def cardinality_error(layer: Layer, targets: Targets) -> Tensor:
    logits = layer["pred_logits"]
    lengths = torch.as_tensor([len(target["labels"]) for target in targets], device=logits.device)
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
    return F.l1_loss(predicted.float(), lengths.float())


def box_losses(layer: Layer, targets: Targets, matches: Matches, num_boxes: float) -> dict[str, Tensor]:
    boxes, target_boxes = layer["pred_boxes"][places(matches)], matched(targets, "boxes", matches)
    l1 = F.l1_loss(boxes, target_boxes, reduction="none")
    ours, theirs = corners(boxes), corners(target_boxes)
    for sides in (ours, theirs):
        assert (sides[:, 2:] >= sides[:, :2]).all()
    giou = torch.diag(giou_of_all_pairs(ours, theirs))
    return {"loss_bbox": l1.sum() / num_boxes, "loss_giou": (1 - giou).sum() / num_boxes}
