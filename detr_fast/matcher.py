"""The bipartite matching of predictions and targets (Carion et al. 2020, section 3.1, equations 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.data.batch import Target
from detr_fast.ops import assignment
from detr_fast.ops.boxes import cxcywh_to_xyxy, pairwise_giou
from detr_fast.targets import check_targets


class HungarianMatcher(nn.Module):
    """Gives every target its own query at the lowest total cost.

    The cost of a pair is ``cost_class * -p(target's class) + cost_bbox * L1 + cost_giou * -GIoU``.

    Args:
        cost_class: weight of the class probability.
        cost_bbox: weight of the L1 distance of the boxes (cxcywh, fractions of the image).
        cost_giou: weight of the generalized IoU.

    Raises:
        ValueError: all weights are zero.
    """

    def __init__(self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1) -> None:
        super().__init__()
        if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
            raise ValueError("one of cost_class, cost_bbox and cost_giou must not be 0")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou

    @torch.no_grad()
    def forward(self, outputs: dict[str, Any], targets: Sequence[Target]) -> list[tuple[Tensor, Tensor]]:
        """Match.

        Args:
            outputs: ``pred_logits`` [B, Q, C + 1] and ``pred_boxes`` [B, Q, 4] cxcywh in [0, 1].
            targets: B dicts with "labels" [T] int64 and "boxes" [T, 4] cxcywh in [0, 1].

        Returns:
            For each image (queries, targets), two int64 CPU tensors of length min(Q, T), the queries ascending.
            With more targets than queries, the Q of them that give the lowest total are matched.

        Raises:
            ValueError: targets are malformed (see ``check_targets``), or a cost is not a number.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        check_targets(targets, num_classes=logits.shape[-1] - 1, batch_size=len(logits))
        counts = [len(target["labels"]) for target in targets]
        cost = logits.new_zeros((*logits.shape[:2], max(counts)), dtype=_at_least_float32(logits))  # [B, Q, T]
        for block, image_logits, image_boxes, target in zip(cost, logits, boxes, targets, strict=True):
            block[:, : len(target["labels"])] = self._cost(image_logits, image_boxes, target)
        queries = assignment(cost, counts).cpu()  # the original's return value lives on the host
        return [_pairs(row[:count]) for row, count in zip(queries, counts, strict=True)]

    def _cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        dtype = _at_least_float32(logits)
        probability = logits.to(dtype).softmax(-1)
        boxes, target_boxes = boxes.to(dtype), target["boxes"].to(dtype)
        cost_class = -probability[:, target["labels"]]  # [Q, T]
        cost_bbox = (boxes[:, None] - target_boxes).abs().sum(-1)
        cost_giou = -pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
        return self.cost_bbox * cost_bbox + self.cost_class * cost_class + self.cost_giou * cost_giou


def _pairs(query_of_target: Tensor) -> tuple[Tensor, Tensor]:
    """The query of each target (-1: none) to matched (queries, targets), the queries ascending."""
    queries, targets = query_of_target.sort()
    matched = int((queries >= 0).sum())  # on the host already
    return queries[len(queries) - matched :], targets[len(queries) - matched :]


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
