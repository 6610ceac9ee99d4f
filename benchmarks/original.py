"""The original DETR's way of doing what this library does otherwise, re-created from its description.

These are contestants and nothing else: they are slow in the way the original is slow, so that a ratio means something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Matches = list[tuple[Tensor, Tensor]]


def match_layers(layers: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> list[Matches]:
    """Match every decoder layer on its own, with the paper's weights (class 1, L1 5, GIoU 2)."""
    return [match(outputs, targets) for outputs in layers]


def match(outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> Matches:
    """The costs of a layer, one copy to the host, one SciPy call an image."""
    cost = all_pairs_cost(outputs, targets).cpu()
    blocks = cost.split([len(target["boxes"]) for target in targets], -1)
    solved = [linear_sum_assignment(block[image]) for image, block in enumerate(blocks)]
    return [(torch.as_tensor(queries), torch.as_tensor(chosen)) for queries, chosen in solved]


def softmax_cost(logits: Tensor) -> Tensor:
    """[queries, classes], minus the probabilities."""
    return -logits.softmax(-1)


def all_pairs_cost(
    outputs: dict[str, Tensor],
    targets: Sequence[dict[str, Tensor]],
    class_cost: Callable[[Tensor], Tensor] = softmax_cost,
) -> Tensor:
    """[B, Q, N]: all queries of the batch against all targets of the batch.

    Only queries and targets of the same image can match, so of B images' costs a share of 1 / B is needed.
    """
    batch, num_queries = outputs["pred_logits"].shape[:2]
    of_classes = class_cost(outputs["pred_logits"].flatten(0, 1))  # [B * Q, C + 1]
    boxes = outputs["pred_boxes"].flatten(0, 1)  # [B * Q, 4]
    labels = torch.cat([target["labels"] for target in targets])  # [N]
    target_boxes = torch.cat([target["boxes"] for target in targets])  # [N, 4]

    cost_class = of_classes[:, labels]
    cost_bbox = torch.cdist(boxes, target_boxes, p=1)
    cost_giou = -giou_of_all_pairs(corners(boxes), corners(target_boxes))
    return (5 * cost_bbox + cost_class + 2 * cost_giou).view(batch, num_queries, -1)


def corners(boxes: Tensor) -> Tensor:
    """[..., 4] cxcywh to xyxy."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def giou_of_all_pairs(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """[..., N, 4] and [..., M, 4] to the generalised IoU of every pair, [..., N, M] (Rezatofighi et al., 2019)."""
    first, second = first_xyxy[..., :, None, :], second_xyxy[..., None, :, :]
    overlap = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(0)
    hull = (torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])).clamp(0)
    area_first, area_second = area(first[..., 2:] - first[..., :2]), area(second[..., 2:] - second[..., :2])
    intersection = area(overlap)
    union = area_first + area_second - intersection
    hull_area = area(hull)
    return intersection / union - (hull_area - union) / hull_area


def area(size: Tensor) -> Tensor:
    """[..., 2] widths and heights to [...]."""
    return size[..., 0] * size[..., 1]
