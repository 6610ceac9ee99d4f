"""The matchers of RT-DETR's own repository, lyuwenyu/RT-DETR: rtdetr_pytorch and rtdetrv2_pytorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.integrations.adapter import Pairs, check_weights, match, pack
from detr_fast.ops import CostWeights


class HungarianMatcher(nn.Module):
    """RT-DETR's, the first version: returns the list of pairs.

    The cost of a pair is ``cost_bbox * L1 - cost_giou * GIoU + cost_class * class term``; for the class term see
    ``CostWeights``: ``focal`` with ``alpha`` and ``gamma``, or minus the softmax probability.

    Args:
        weight_dict: the weights "cost_class", "cost_bbox" and "cost_giou".
        use_focal_loss: which class term.
        alpha, gamma: of the focal term.

    Raises:
        ValueError: all weights are zero.
    """

    def __init__(
        self, weight_dict: Mapping[str, float], use_focal_loss: bool = False, alpha: float = 0.25, gamma: float = 2.0
    ) -> None:
        super().__init__()
        self.cost_class = weight_dict["cost_class"]
        self.cost_bbox = weight_dict["cost_bbox"]
        self.cost_giou = weight_dict["cost_giou"]
        self.use_focal_loss = use_focal_loss
        self.alpha = alpha
        self.gamma = gamma
        check_weights(self.cost_class, self.cost_bbox, self.cost_giou)

    @classmethod
    def like(cls, theirs: Any) -> HungarianMatcher:
        """With the weights of RT-DETR's own matcher."""
        weights = {name: getattr(theirs, name) for name in ("cost_class", "cost_bbox", "cost_giou")}
        return cls(weights, theirs.use_focal_loss, theirs.alpha, theirs.gamma)

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> Pairs:
        """Match one decoder layer.

        Args:
            outputs: ``pred_logits`` [B, Q, classes] and ``pred_boxes`` [B, Q, 4] cxcywh in [0, 1].
            targets: B dicts with "labels" [T] and "boxes" [T, 4] cxcywh in [0, 1].

        Returns:
            For each image (queries, targets), two int64 CPU tensors of length min(Q, T), the queries ascending.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        return match(logits, boxes, pack(targets, "labels", len(logits)), self.weights)

    @property
    def weights(self) -> CostWeights:
        return CostWeights(self.cost_class, self.cost_bbox, self.cost_giou, self.use_focal_loss, self.alpha, self.gamma)


class HungarianMatcherV2(HungarianMatcher):
    """RT-DETRv2's: as the first version's, but the pairs are returned in a dict."""

    def forward(  # type: ignore[override]
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Pairs]:
        """As the first version's; returns ``{"indices": pairs}``."""
        return {"indices": super().forward(outputs, targets)}
