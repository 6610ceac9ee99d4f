"""The bipartite matching of predictions and targets (Carion et al. 2020, section 3.1, equations 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.data.batch import Target
from detr_fast.ops import CostWeights, PackedTargets, PaddedTargets, matching
from detr_fast.ops.boxes import cxcywh_to_xyxy, elementwise_giou
from detr_fast.targets import check_and_pack, pack


class HungarianMatcher(nn.Module):
    """Gives every target its own query at the lowest total cost.

    The cost of a pair is ``cost_class * -p(target's class) + cost_bbox * L1 + cost_giou * -GIoU``. A pair whose cost is
    not a number is matched only where no other is left.

    Args:
        cost_class: weight of the class probability.
        cost_bbox: weight of the L1 distance of the boxes (cxcywh, fractions of the image).
        cost_giou: weight of the generalized IoU.
        strict: refuse costs that are not numbers, which waits for the device.

    Raises:
        ValueError: all weights are zero.
    """

    def __init__(
        self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1, *, strict: bool = False
    ) -> None:
        super().__init__()
        if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
            raise ValueError("one of cost_class, cost_bbox and cost_giou must not be 0")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.strict = strict

    @torch.no_grad()
    def forward(self, outputs: dict[str, Any], targets: Sequence[Target]) -> list[tuple[Tensor, Tensor]]:
        """Match one decoder layer.

        Args:
            outputs: ``pred_logits`` [B, Q, C + 1] and ``pred_boxes`` [B, Q, 4] cxcywh in [0, 1].
            targets: B dicts with "labels" [T] int64 and "boxes" [T, 4] cxcywh in [0, 1].

        Returns:
            For each image (queries, targets), two int64 CPU tensors of length min(Q, T), the queries ascending.
            With more targets than queries, the Q of them that give the lowest total are matched.

        Raises:
            ValueError: targets are malformed (see ``check_targets``), or, with ``strict``, a cost is not a number.
        """
        (queries,) = self.match_layers([outputs], targets).cpu()  # the original's return value lives on the host
        return [matched_pairs(row) for row in queries.split([len(target["labels"]) for target in targets])]

    def match_layers(
        self, layers: Sequence[dict[str, Any]], targets: Sequence[Target], *, validate: bool = True
    ) -> Tensor:
        """Match L decoder layers at once: the fast way in.

        Args:
            layers: L dicts as in ``forward``, of the same shapes.
            targets: as in ``forward``.
            validate: check the targets; False where that is done already.

        Returns:
            [L, N] int64 on the outputs' device: for each of the batch's N targets its query, -1 where there is none.

        Raises:
            ValueError: as ``forward``.
        """
        logits = [outputs["pred_logits"] for outputs in layers]
        boxes = [outputs["pred_boxes"] for outputs in layers]
        if validate:
            packed = check_and_pack(targets, num_classes=logits[0].shape[-1] - 1, batch_size=len(logits[0]))
        else:
            packed = pack(targets)
        return self.match_packed(logits, boxes, packed)

    @torch.no_grad()
    def match_packed(
        self, logits: Sequence[Tensor], boxes: Sequence[Tensor], targets: PackedTargets | PaddedTargets
    ) -> Tensor:
        """As ``match_layers``, of predictions as ``matching`` takes them, whose targets are packed and checked."""
        queries, num_nonfinite = matching(logits, boxes, targets, self.cost_weights)
        self.check_costs(num_nonfinite, logits, boxes, targets)
        return queries

    @property
    def cost_weights(self) -> CostWeights:
        """What ``matching`` and ``set_criterion`` are told."""
        return CostWeights(self.cost_class, self.cost_bbox, self.cost_giou)

    def check_costs(
        self,
        num_nonfinite: Tensor,
        logits: Sequence[Tensor],
        boxes: Sequence[Tensor],
        targets: PackedTargets | PaddedTargets,
    ) -> None:
        """With ``strict``, raise where the matching found costs that are not numbers."""
        if self.strict and bool(num_nonfinite.any()):  # waits for the device, as asked for
            packed = targets.trimmed() if isinstance(targets, PaddedTargets) else targets
            _raise_for_nonfinite(logits, boxes, packed)


def matched_pairs(query_of_target: Tensor) -> tuple[Tensor, Tensor]:
    """An image's [T] queries on the host (-1: none) to matched (queries, targets), the queries ascending."""
    queries, targets = query_of_target.sort()
    unmatched = int((queries < 0).sum())  # on the host already
    return queries[unmatched:], targets[unmatched:]


def _raise_for_nonfinite(logits: Sequence[Tensor], boxes: Sequence[Tensor], targets: PackedTargets) -> None:
    """Name the first pair whose cost is not a number, and the term that is to blame."""
    counts = list(targets.num_targets)
    of_images = list(zip(targets.labels.split(counts), targets.boxes.split(counts), strict=True))
    for layer, (layer_logits, layer_boxes) in enumerate(zip(logits, boxes, strict=True)):
        for image, (labels, target_boxes) in enumerate(of_images):
            query_boxes = layer_boxes[image][:, None]
            terms = {
                "class probability": layer_logits[image].softmax(-1)[:, labels],
                "L1 distance": (query_boxes - target_boxes).abs().sum(-1),
                "GIoU": elementwise_giou(cxcywh_to_xyxy(query_boxes), cxcywh_to_xyxy(target_boxes)),
            }
            for name, term in terms.items():  # each [Q, T]
                bad = (~term.isfinite()).nonzero().tolist()  # in an error's path, which may wait
                if bad:
                    query, index = bad[0]
                    raise ValueError(
                        f"the {name} of image {image}, query {query}, target {index} at decoder layer {layer} "
                        f"is not a number: {term[query, index].item()}"  # likewise
                    )
