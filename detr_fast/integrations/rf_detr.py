"""The matcher of RF-DETR's own repository, roboflow/rf-detr (as of version 1.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from detr_fast.integrations.adapter import Pairs, check_weights, match, of_each_target, pack, without_negative_sizes
from detr_fast.ops import CostWeights, PackedTargets

# RF-DETR's matcher does not take its ``focal_alpha`` but always these.
ALPHA, GAMMA = 0.25, 2


class HungarianMatcher(nn.Module):
    """RF-DETR's for detection: a focal class term without a small constant in its logarithms, and groups of queries.

    The cost of a pair is ``cost_bbox * L1 - cost_giou * GIoU + cost_class * class term``, with p the class's sigmoid:
    ``-alpha (1 - p)^gamma log(p) + (1 - alpha) p^gamma log(1 - p)`` for alpha = 0.25 and gamma = 2. GIoU takes a
    negative width or height of a prediction for 0.

    Args:
        cost_class, cost_bbox, cost_giou: the weights.
        focal_alpha: kept but without effect, as in RF-DETR.
        use_pos_only, use_position_modulated_cost: must be false; LW-DETR's matcher, from which RF-DETR's comes,
            gives them a meaning, RF-DETR's does not.
        mask_point_sample_ratio, cost_mask_ce, cost_mask_dice: kept but without effect, as masks are refused.

    Raises:
        ValueError: all weights of class and boxes are zero.
        NotImplementedError: ``use_pos_only`` or ``use_position_modulated_cost``.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        focal_alpha: float = 0.25,
        use_pos_only: bool = False,
        use_position_modulated_cost: bool = False,
        mask_point_sample_ratio: int = 16,
        cost_mask_ce: float = 1,
        cost_mask_dice: float = 1,
    ) -> None:
        super().__init__()
        check_weights(cost_class, cost_bbox, cost_giou)
        if use_pos_only or use_position_modulated_cost:
            raise NotImplementedError("use_pos_only and use_position_modulated_cost must be False")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.focal_alpha = focal_alpha
        self.mask_point_sample_ratio = mask_point_sample_ratio
        self.cost_mask_ce = cost_mask_ce
        self.cost_mask_dice = cost_mask_dice

    @classmethod
    def like(cls, theirs: Any) -> HungarianMatcher:
        """With the weights of RF-DETR's own matcher."""
        names = ("cost_class", "cost_bbox", "cost_giou", "focal_alpha", "mask_point_sample_ratio")
        return cls(**{name: getattr(theirs, name) for name in (*names, "cost_mask_ce", "cost_mask_dice")})

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]], group_detr: int = 1
    ) -> Pairs:
        """Match one decoder layer.

        Args:
            outputs: ``pred_logits`` [B, Q, classes] and ``pred_boxes`` [B, Q, 4] cxcywh.
            targets: B dicts with "labels" [T] and "boxes" [T, 4] cxcywh in [0, 1].
            group_detr: how many groups of Q // group_detr queries are matched, each with all targets.

        Returns:
            For each image (queries, targets), two int64 CPU tensors: group after group, each of length
            min(Q // group_detr, T), the queries ascending.

        Raises:
            NotImplementedError: the targets have masks, whose cost (of points drawn at random) is not computed.
        """
        if targets and "masks" in targets[0]:
            raise NotImplementedError(
                "targets have masks: RF-DETR's cost for segmentation has a term on masks that this matcher does not "
                "compute; keep RF-DETR's own matcher there"
            )
        logits = outputs["pred_logits"]
        packed = pack(targets, "labels", len(logits))
        boxes, shortened = without_negative_sizes(outputs["pred_boxes"])
        extra = self.cost_bbox * of_each_target(shortened, packed.num_targets)
        extra = extra + self.cost_class * class_cost(logits, packed)
        # The class term is among the extra; ``focal`` spares the softmax that its weight of 0 would discard.
        weights = CostWeights(0, self.cost_bbox, self.cost_giou, focal=True)
        return match(logits, boxes, packed, weights, extra_cost=extra, group_detr=group_detr)


def class_cost(logits: Tensor, targets: PackedTargets) -> Tensor:
    """[B, Q, classes] to [N, Q], float32 at least."""
    labels = targets.labels.split(list(targets.num_targets))
    x = torch.cat([image[:, found].T for image, found in zip(logits, labels, strict=True)])
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    p = x.sigmoid()
    return ALPHA * (1 - p) ** GAMMA * softplus(-x) - (1 - ALPHA) * p**GAMMA * softplus(x)
