"""The set prediction loss (Carion et al. 2020, section 3.1, equation 2, and appendix A.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.data.batch import Target
from detr_fast.distributed import mean_over_processes
from detr_fast.matcher import HungarianMatcher, matched_pairs
from detr_fast.ops.boxes import cxcywh_to_xyxy, elementwise_giou
from detr_fast.targets import check_targets

Indices = Sequence[tuple[Tensor, Tensor]]


class SetCriterion(nn.Module):
    """Matches predictions and targets, then trains the matched pairs, at every decoder layer.

    Args:
        num_classes: C, without "no object".
        matcher: (outputs, targets) to a (queries, targets) pair of index tensors for each image.
        weight_dict: the weight of each loss by its name. ``forward`` does not apply it: the training loop does.
        eos_coef: weight of the class "no object" in the cross-entropy.
        losses: which to compute: "labels", "boxes", "cardinality".
        validate: check the targets (see ``check_targets``); malformed ones may otherwise raise anything, or nothing.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: Mapping[str, float],
        eos_coef: float,
        losses: Sequence[str],
        *,
        validate: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = dict(weight_dict)
        self.eos_coef = eos_coef
        self.losses = list(losses)
        self.validate = validate
        self._loss_functions = {
            "labels": self.loss_labels,
            "boxes": self.loss_boxes,
            "cardinality": self.loss_cardinality,
        }
        unknown = set(losses) - set(self._loss_functions)
        if unknown:
            raise ValueError(f"losses must be among {sorted(self._loss_functions)}, got {sorted(unknown)}")
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)
        self.empty_weight: Tensor

    def forward(self, outputs: dict[str, Any], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Every loss by its name, unweighted; those of the earlier decoder layers end in ``_0``, ``_1``, ...

        Args:
            outputs: ``pred_logits`` [B, Q, C + 1], ``pred_boxes`` [B, Q, 4] cxcywh in [0, 1], and, for auxiliary
                losses, ``aux_outputs``, a list of such dicts.
            targets: B dicts with "labels" [T] int64 and "boxes" [T, 4] cxcywh in [0, 1].

        Returns:
            ``loss_ce``, ``loss_bbox``, ``loss_giou``, and for logging ``class_error`` (percent of matched queries
            with a wrong class, last layer only) and ``cardinality_error`` (objects), scalars on the outputs' device.

        Raises:
            ValueError: targets are malformed (see ``check_targets``).
        """
        if self.validate:
            check_targets(targets, self.num_classes, batch_size=len(outputs["pred_logits"]))
        num_boxes = self._num_boxes(outputs["pred_logits"], targets)
        layers = [outputs, *outputs.get("aux_outputs", [])]
        final, *earlier = [
            self._layer_losses(layer, targets, indices, num_boxes)
            for layer, indices in zip(layers, self._match(layers, targets), strict=True)
        ]
        losses = dict(final)
        for number, layer_losses in enumerate(earlier):
            layer_losses.pop("class_error", None)
            losses.update({f"{name}_{number}": value for name, value in layer_losses.items()})
        return losses

    def loss_labels(
        self, outputs: dict[str, Tensor], targets: Sequence[Target], indices: Indices, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Weighted cross-entropy of all queries, the unmatched ones being "no object"; and the class error."""
        logits = _float32(outputs["pred_logits"])  # [B, Q, C + 1]
        matched = _query_index(indices, logits.device)
        labels = _matched(targets, "labels", indices, logits.device)  # [matched pairs]
        target_classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        target_classes[matched] = labels
        weight = self.empty_weight.to(logits.dtype)
        loss_ce = F.cross_entropy(logits.flatten(0, 1), target_classes.flatten(), weight)
        correct = (logits.detach()[matched].argmax(-1) == labels).to(logits.dtype)
        return {"loss_ce": loss_ce, "class_error": 100 - 100 * correct.sum() / max(len(labels), 1)}

    @torch.no_grad()
    def loss_cardinality(
        self, outputs: dict[str, Tensor], targets: Sequence[Target], indices: Indices, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """How far the number of queries whose best class is an object is from the number of objects; for logging."""
        logits = outputs["pred_logits"]
        num_targets = torch.tensor([float(len(target["labels"])) for target in targets], device=logits.device)
        num_predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
        return {"cardinality_error": (num_predicted - num_targets).abs().mean()}

    def loss_boxes(
        self, outputs: dict[str, Tensor], targets: Sequence[Target], indices: Indices, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """L1 distance (cxcywh) and 1 - GIoU of matched boxes, summed and divided by ``num_boxes``."""
        all_boxes = _float32(outputs["pred_boxes"])
        boxes = all_boxes[_query_index(indices, all_boxes.device)]  # [matched pairs, 4]
        target_boxes = _matched(targets, "boxes", indices, boxes.device).to(boxes.dtype)
        giou = elementwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
        return {
            "loss_bbox": (boxes - target_boxes).abs().sum() / num_boxes,
            "loss_giou": (1 - giou).sum() / num_boxes,
        }

    def _match(self, layers: Sequence[dict[str, Any]], targets: Sequence[Target]) -> list[Indices]:
        """The matched pairs of every decoder layer; in one call where the matcher can do that."""
        # A subclass that matches in its own way is asked layer by layer, as in the original.
        if type(self.matcher).forward is not HungarianMatcher.forward:
            return [self.matcher({k: v for k, v in layer.items() if k != "aux_outputs"}, targets) for layer in layers]
        matcher = cast(HungarianMatcher, self.matcher)
        queries = matcher.match_layers(layers, targets, validate=False)  # [L, N]
        queries = queries.cpu()  # what is below indexes with tensors of the host
        counts = [len(target["labels"]) for target in targets]
        return [[matched_pairs(image) for image in layer.split(counts)] for layer in queries]

    def _layer_losses(
        self, outputs: dict[str, Any], targets: Sequence[Target], indices: Indices, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for name in self.losses:
            losses.update(self._loss_functions[name](outputs, targets, indices, num_boxes))
        return losses

    def _num_boxes(self, logits: Tensor, targets: Sequence[Target]) -> Tensor:
        """Targets of the batch, averaged over processes, at least 1: the normaliser of the box losses."""
        count = sum(len(target["labels"]) for target in targets)
        num_boxes = torch.full((), count, dtype=torch.float32, device=logits.device)
        return mean_over_processes(num_boxes).clamp(min=1)


def _float32(x: Tensor) -> Tensor:
    # Losses are computed in float32 at least: under autocast the heads may give bfloat16.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _query_index(indices: Indices, device: torch.device) -> tuple[Tensor, Tensor]:
    """(image, query) index tensors of all matched pairs, to index [B, Q, ...]."""
    images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(indices)])
    queries = torch.cat([queries for queries, _ in indices])
    return images.to(device), queries.to(device)


def _matched(targets: Sequence[Target], key: str, indices: Indices, device: torch.device) -> Tensor:
    """``target[key]`` of all matched pairs, in the order of ``_query_index``."""
    chosen = [target[key][index.to(target[key].device)] for target, (_, index) in zip(targets, indices, strict=True)]
    return torch.cat(chosen).to(device)
