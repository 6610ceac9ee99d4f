"""What the adapters share: targets in, pairs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detr_fast.matcher import matched_pairs
from detr_fast.ops import CostWeights, PackedTargets, matching

Pairs = list[tuple[Tensor, Tensor]]


def check_weights(cost_class: float, cost_bbox: float, cost_giou: float) -> None:
    """Raise ValueError where all weights are zero."""
    if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
        raise ValueError("one of the costs of class, bbox and giou must not be 0")


def pack(targets: Sequence[Mapping[str, Tensor]], labels_key: str, batch_size: int) -> PackedTargets:
    """Targets one behind the other.

    Args:
        targets: one dict an image: ``labels_key`` [T] of any integer dtype, "boxes" [T, 4] cxcywh in [0, 1]. Where
            T is 0, any empty tensor will do.
        labels_key: where the library keeps the labels.
        batch_size: how many targets there must be.

    Raises:
        ValueError: names the image whose target is not so.
    """
    if len(targets) != batch_size:
        raise ValueError(f"targets must be one dict an image: got {len(targets)} for {batch_size} images")
    packed = [_labels_and_boxes(target, index, labels_key) for index, target in enumerate(targets)]
    labels, boxes = zip(*packed, strict=True)
    return PackedTargets(torch.cat(labels), torch.cat(boxes), [len(image_labels) for image_labels in labels])


def _labels_and_boxes(target: Mapping[str, Tensor], index: int, labels_key: str) -> tuple[Tensor, Tensor]:
    for key in (labels_key, "boxes"):
        if key not in target:
            raise ValueError(f"target {index} has no {key!r}, only {sorted(target)}")
    labels, boxes = target[labels_key], target["boxes"]
    if boxes.numel() == 0:
        boxes = boxes.reshape(0, 4)
    if labels.ndim != 1 or boxes.shape != (len(labels), 4):
        got = f"{list(labels.shape)} and {list(boxes.shape)}"
        raise ValueError(f"{labels_key} and boxes of target {index} must be [T] and [T, 4], got {got}")
    return labels.long(), boxes


def match(
    logits: Tensor,
    boxes: Tensor,
    targets: PackedTargets,
    weights: CostWeights,
    *,
    extra_cost: Tensor | None = None,
    group_detr: int = 1,
) -> Pairs:
    """Match the queries of every image, or each of their groups, with its targets.

    Args:
        logits: [B, Q, classes].
        boxes: [B, Q, 4] cxcywh.
        targets: of the B images.
        weights: of the cost.
        extra_cost: [N, Q] to add.
        group_detr: G. Group g holds queries g * (Q // G) to (g + 1) * (Q // G) - 1 and is matched with all targets;
            Q - G * (Q // G) queries at the end stay without one.

    Returns:
        For each image (queries, targets), two int64 CPU tensors of length G * min(Q // G, T), the queries ascending.

    Raises:
        ValueError: ``group_detr`` is not in [1, Q], or as ``matching``.
    """
    num_queries = logits.shape[1]
    if not 1 <= group_detr <= num_queries:
        raise ValueError(f"group_detr must be from 1 to the number of queries, {num_queries}, got {group_detr}")
    size = num_queries // group_detr
    groups = [slice(start, start + size) for start in range(0, group_detr * size, size)]
    extra = None if extra_cost is None else [extra_cost[:, group] for group in groups]
    # A group is to ``matching`` what a decoder layer is: other predictions of the same images.
    result = matching([logits[:, g] for g in groups], [boxes[:, g] for g in groups], targets, weights, extra_cost=extra)
    queries = result.query_of_target.cpu()  # [G, N]; the libraries return indices on the host
    return [_pairs_of_groups(image, size) for image in queries.split(list(targets.num_targets), 1)]


def _pairs_of_groups(query_of_target: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """An image's [G, T] queries within their groups to its matched (queries, targets)."""
    pairs = [matched_pairs(row) for row in query_of_target]
    queries = torch.cat([group_queries + group * size for group, (group_queries, _) in enumerate(pairs)])
    return queries, torch.cat([group_targets for _, group_targets in pairs])


def without_negative_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """For libraries whose GIoU takes a negative width or height for 0, but whose L1 distance takes it as it is.

    Args:
        boxes: [B, Q, 4] cxcywh.

    Returns:
        The boxes with negative sizes at 0, and [B, Q] by how much that shortens the L1 distance to any target.
    """
    sizes = boxes[..., 2:]
    return torch.cat((boxes[..., :2], sizes.clamp(min=0)), -1), -sizes.clamp(max=0).sum(-1)


def of_each_target(values: Tensor, num_targets: Sequence[int]) -> Tensor:
    """[B, Q] to [N, Q]: every target gets the row of its image."""
    return torch.cat([row.expand(count, -1) for row, count in zip(values, num_targets, strict=True)])
