"""The matcher of D-FINE's own repository, Peterande/D-FINE; DEIM's, ShihuaHuang95/DEIM, is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast.integrations import rt_detr
from detr_fast.integrations.adapter import Pairs, match, of_each_target, pack, without_negative_sizes


class HungarianMatcher(rt_detr.HungarianMatcher):
    """D-FINE's: RT-DETR's cost, whose GIoU takes a negative width or height of a prediction for 0.

    Arguments and errors as RT-DETR's.
    """

    @torch.no_grad()
    def forward(  # type: ignore[override]
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]], return_topk: int | bool = False
    ) -> dict[str, Pairs]:
        """Match one decoder layer.

        Args:
            outputs: ``pred_logits`` [B, Q, classes] and ``pred_boxes`` [B, Q, 4] cxcywh.
            targets: B dicts with "labels" [T] and "boxes" [T, 4] cxcywh in [0, 1].
            return_topk: must be false.

        Returns:
            {"indices": pairs}: for each image (queries, targets), two int64 CPU tensors of length min(Q, T), the
            queries ascending.

        Raises:
            NotImplementedError: ``return_topk`` asks for several queries a target, as no criterion of D-FINE does.
        """
        if return_topk:
            raise NotImplementedError(f"return_topk must be False: a target gets one query only, got {return_topk!r}")
        logits = outputs["pred_logits"]
        packed = pack(targets, "labels", len(logits))
        boxes, shortened = without_negative_sizes(outputs["pred_boxes"])
        extra = self.cost_bbox * of_each_target(shortened, packed.num_targets)
        return {"indices": match(logits, boxes, packed, self.weights, extra_cost=extra)}
