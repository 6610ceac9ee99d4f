"""The set prediction loss (Carion et al. 2020, section 3.1, equation 2, and appendix A.2)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.data.batch import Target
from detr_fast.distributed import mean_over_processes, world_size
from detr_fast.loss_names import NAMES, known_of_layer, named, with_numbers
from detr_fast.mask_losses import mask_losses
from detr_fast.matcher import HungarianMatcher
from detr_fast.ops import CrossEntropy, PackedTargets, PaddedTargets
from detr_fast.ops.boxes import cxcywh_to_xyxy, elementwise_giou
from detr_fast.ops.set_criterion.api import stacked_results
from detr_fast.ops.set_loss.api import stacked_losses
from detr_fast.targets import check_and_pack, pack

Indices = Sequence[tuple[Tensor, Tensor]]

# The original finds those of masks too costly to compute at every layer.
FINAL_LAYER_ONLY = ("masks",)


class SetCriterion(nn.Module):
    """Matches predictions and targets, then trains the matched pairs, at every decoder layer.

    Matching and losses are computed for all layers and images at once, and on a GPU without waiting for it. A subclass
    may change that in the original's ways, at the original's cost: a loss whose method (``loss_labels``,
    ``loss_boxes``, ``loss_cardinality``) it overrides is computed layer by layer, and with a ``get_loss`` of its own
    all are; a matcher with a ``forward`` of its own is asked layer by layer, and then all losses are too.

    Args:
        num_classes: C, without "no object".
        matcher: (outputs, targets) to a (queries, targets) pair of index tensors for each image.
        weight_dict: the weight of each loss by its name. ``forward`` does not apply it: the training loop does.
        eos_coef: weight of the class "no object" in the cross-entropy. The weights of all classes are the buffer
            ``empty_weight`` [C + 1], and can be changed there.
        losses: which to compute: "labels", "boxes", "cardinality", "masks", and what a subclass's ``get_loss`` adds.
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
        self._weights: tuple[tuple[Any, ...], Tensor] | None = None  # those of ``total``, and what they were made for
        unknown = set(losses) - set(self._loss_functions())
        if unknown and _keeps(self, SetCriterion, "get_loss"):
            raise ValueError(f"losses must be among {sorted(self._loss_functions())}, got {sorted(unknown)}")
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)
        self.empty_weight: Tensor

    def forward(self, outputs: dict[str, Any], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Every loss by its name, unweighted; those of the earlier decoder layers end in ``_0``, ``_1``, ...

        Args:
            outputs: ``pred_logits`` [B, Q, C + 1], ``pred_boxes`` [B, Q, 4] cxcywh in [0, 1], and, for auxiliary
                losses, ``aux_outputs``, a list of such dicts.
            targets: B dicts with "labels" [T] int64 and "boxes" [T, 4] cxcywh in [0, 1], for "masks" also "masks"
                [T, height, width] bool; then ``pred_masks`` is among the outputs.

        Returns:
            ``loss_ce``, ``loss_bbox``, ``loss_giou``, ``loss_mask``, ``loss_dice``, and for logging ``class_error``
            (percent of matched queries with a wrong class, last layer only) and ``cardinality_error`` (objects),
            scalars on the outputs' device.

        Raises:
            ValueError: targets are malformed (see ``check_targets``), or outputs and criterion do not fit together.
        """
        if self.validate:
            packed = check_and_pack(targets, self.num_classes, batch_size=len(outputs["pred_logits"]))
        else:
            packed = pack(targets)
        num_boxes = self._num_boxes(outputs["pred_logits"], packed)
        layers = [outputs, *outputs.get("aux_outputs", ())]
        if _keeps(self.matcher, HungarianMatcher, "forward", "match_layers"):
            return self._losses_at_once(layers, targets, packed, num_boxes)
        # A matcher that matches in its own way is asked layer by layer, as in the original.
        return with_numbers(self._losses_by_layer(layers, targets, num_boxes))

    def of_padded(self, outputs: dict[str, Any], targets: PaddedTargets) -> dict[str, Tensor]:
        """As ``forward``, unchecked; see ``why_not_padded``."""
        layers = [outputs, *outputs.get("aux_outputs", ())]
        return self._losses_at_once(layers, (), targets, self._num_boxes(outputs["pred_logits"], targets))

    def held(self) -> list[Tensor]:
        """What ``of_padded`` and ``total`` read besides their arguments: a graph of them reads it where it lies now."""
        return [self.empty_weight, *([] if self._weights is None else [self._weights[1]])]

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum of ``losses`` weighted by ``weight_dict``: what a training loop minimises.

        It is the original loop's sum, in two calls for torch instead of two a loss, forward and backward.

        Raises:
            ValueError: none of the losses has a weight.
        """
        weight_of = self.weight_dict
        names = [name for name in losses if name in weight_of]
        if not names:
            raise ValueError(f"losses must have one of {list(weight_of)} (weight_dict), got {list(losses)}")
        values, numbers = getattr(losses, "at_once", None) or (None, {})
        as_computed = all(
            _is_as_made(number) and losses.get(name) is number and name in weight_of for name, number in numbers.items()
        )
        if values is not None and as_computed and len(names) == len(numbers):
            names = list(numbers)
        else:
            values = torch.stack([losses[name] for name in names])
        return values.dot(self._on_device(tuple([weight_of[name] for name in names]), values))

    def _on_device(self, weights: tuple[float, ...], like: Tensor) -> Tensor:
        key = (weights, like.dtype, like.device)
        if self._weights is None or self._weights[0] != key:
            # Asynchronous for the host, though its memory is not pinned.
            self._weights = key, torch.tensor(weights, dtype=like.dtype).to(like.device, non_blocking=True)
        return self._weights[1]

    def get_loss(
        self,
        loss: str,
        outputs: dict[str, Tensor],
        targets: Sequence[Target],
        indices: Indices,
        num_boxes: Tensor,
        **options: Any,
    ) -> dict[str, Tensor]:
        """One of ``losses``, of one layer: what ``forward`` calls for those that it does not compute at once.

        Args:
            indices: for each image the matched (queries, targets), the queries ascending, on the outputs' device.
            options: ``log=False`` for "labels" of an earlier layer: without the class error.
        """
        return self._loss_functions()[loss](outputs, targets, indices, num_boxes, **options)

    def loss_labels(
        self,
        outputs: dict[str, Tensor],
        targets: Sequence[Target],
        indices: Indices,
        num_boxes: Tensor,
        log: bool = True,
    ) -> dict[str, Tensor]:
        """Weighted cross-entropy of all queries, the unmatched ones being "no object"; and the class error."""
        logits = _float32(outputs["pred_logits"])  # [B, Q, C + 1]
        matched = _query_index(indices, logits.device)
        labels = _matched(targets, "labels", indices, logits.device)  # [matched pairs]
        target_classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        target_classes[matched] = labels
        weight = self.empty_weight.to(logits.dtype)
        losses = {"loss_ce": F.cross_entropy(logits.flatten(0, 1), target_classes.flatten(), weight)}
        if log:
            correct = (logits.detach()[matched].argmax(-1) == labels).to(logits.dtype)
            losses["class_error"] = 100 - 100 * correct.sum() / max(len(labels), 1)
        return losses

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

    def loss_masks(
        self, outputs: dict[str, Any], targets: Sequence[Target], indices: Indices, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """``loss_mask`` and ``loss_dice`` of matched masks (see ``mask_losses``); of the last layer only."""
        return mask_losses(outputs["pred_masks"], targets, indices, num_boxes)

    def _losses_by_layer(
        self, layers: Sequence[dict[str, Any]], targets: Sequence[Target], num_boxes: Tensor
    ) -> list[dict[str, Tensor]]:
        alone = [{key: value for key, value in layer.items() if key != "aux_outputs"} for layer in layers]
        matches = [self.matcher(layer, targets) for layer in alone]
        return [
            self._layer_losses(number, layer, targets, indices, num_boxes, {})
            for number, (layer, indices) in enumerate(zip(layers, matches, strict=True))
        ]

    def _losses_at_once(
        self,
        layers: Sequence[dict[str, Any]],
        targets: Sequence[Target],
        packed: PackedTargets | PaddedTargets,
        num_boxes: Tensor,
    ) -> dict[str, Tensor]:
        names = tuple(
            [name for name in self.losses if name in NAMES and _keeps(self, SetCriterion, f"loss_{name}", "get_loss")]
        )
        groups = _alike(layers)
        all_are_known = len(names) == len(self.losses)
        losses: dict[int, dict[str, Tensor]] = {}
        for group in groups:
            logits, boxes = ([layers[number][key] for number in group] for key in ("pred_logits", "pred_boxes"))
            if names:
                queries, values, numbers = self._values_at_once(logits, boxes, packed, num_boxes)
                if all_are_known and len(groups) == 1:
                    return named(names, values, numbers)
            else:
                queries, numbers = cast(HungarianMatcher, self.matcher).match_packed(logits, boxes, packed), ()
            # Of layers whose losses are all known nobody looks at the pairs.
            for place, number in enumerate(group):
                indices = () if all_are_known else _pairs(queries[place], packed, logits[0].shape[1])
                known = known_of_layer(names, numbers[place :: len(group)], number)
                losses[number] = self._layer_losses(number, layers[number], targets, indices, num_boxes, known)
        return with_numbers([losses[number] for number in range(len(layers))])

    def _values_at_once(
        self, logits: list[Tensor], boxes: list[Tensor], packed: PackedTargets | PaddedTargets, num_boxes: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Every target's query [layers, N]; the losses of all layers, ROWS[:3], as one tensor; ROWS as numbers."""
        weight = self.empty_weight
        if len(weight) != logits[0].shape[2] or weight.device != logits[0].device:
            expected = f"[B, Q, {len(weight)}] (num_classes + 1) on {weight.device}, where the criterion is"
            raise ValueError(f"pred_logits must be {expected}, got {list(logits[0].shape)} on {logits[0].device}")
        matcher, class_loss = cast(HungarianMatcher, self.matcher), CrossEntropy(weight=weight)
        if _keeps(matcher, HungarianMatcher, "match_packed"):
            losses, metrics, queries, num_nonfinite, *numbers = stacked_results(
                logits, boxes, packed, matcher.cost_weights, class_loss, num_boxes, singly=True
            )
            matcher.check_costs(num_nonfinite, logits, boxes, packed)
        else:
            queries = matcher.match_packed(logits, boxes, packed)
            losses, metrics, *numbers = stacked_losses(
                logits, boxes, packed, queries, class_loss, num_boxes, singly=True
            )
        return queries, losses, (*numbers, *metrics.flatten().unbind())

    def _layer_losses(
        self,
        number: int,
        outputs: dict[str, Tensor],
        targets: Sequence[Target],
        indices: Indices,
        num_boxes: Tensor,
        known: Mapping[str, dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Every loss of a layer, of which 0 is the final one, in the order of ``self.losses``."""
        losses: dict[str, Tensor] = {}
        for name in self.losses:
            if name in known:
                losses.update(known[name])
            elif number == 0 or name not in FINAL_LAYER_ONLY:
                options = {"log": False} if number > 0 and name == "labels" else {}
                losses.update(self.get_loss(name, outputs, targets, indices, num_boxes, **options))
        return losses

    def _loss_functions(self) -> dict[str, Callable[..., dict[str, Tensor]]]:
        return {
            "labels": self.loss_labels,
            "boxes": self.loss_boxes,
            "cardinality": self.loss_cardinality,
            "masks": self.loss_masks,
        }

    def _num_boxes(self, logits: Tensor, packed: PackedTargets | PaddedTargets) -> Tensor:
        """Targets of the batch, averaged over processes, at least 1: the normaliser of the box losses."""
        if isinstance(packed, PaddedTargets):
            return mean_over_processes(packed.offsets[-1].float()).clamp(min=1)
        count, device = sum(packed.num_targets), logits.device
        if world_size() == 1:
            return torch.full((), max(count, 1), dtype=torch.float32, device=device)
        return mean_over_processes(torch.full((), count, dtype=torch.float32, device=device)).clamp(min=1)


def why_not_padded(criterion: nn.Module) -> str | None:
    """What keeps a criterion from computing its losses of padded targets, without a wait; None where nothing does."""
    name = type(criterion).__name__
    if not isinstance(criterion, SetCriterion) or not _keeps(criterion, SetCriterion, "forward", "get_loss"):
        return f"{name} computes its losses in its own way"
    known = [loss for loss in criterion.losses if loss in NAMES and _keeps(criterion, SetCriterion, f"loss_{loss}")]
    if known != criterion.losses:
        return f"{name} computes some of its losses layer by layer: of {criterion.losses} all but {known}"
    if not _keeps(criterion.matcher, HungarianMatcher, "forward", "match_layers", "match_packed", "check_costs"):
        return f"{type(criterion.matcher).__name__} matches in its own way"
    return "a strict matcher looks at its costs" if cast(HungarianMatcher, criterion.matcher).strict else None


def _is_as_made(number: Tensor) -> bool:
    """Whether nobody has changed it in place; of inference mode's, which autograd never sees, that does not matter."""
    return number.is_inference() or number._version == 0


def _keeps(module: nn.Module, parent: type[nn.Module], *methods: str) -> bool:
    """Whether no subclass has overridden these methods of ``parent``, and nobody has replaced them in this object."""
    return all(getattr(getattr(module, m, None), "__func__", None) is getattr(parent, m) for m in methods)


def _alike(layers: Sequence[dict[str, Any]]) -> Collection[list[int]]:
    """The numbers of layers whose outputs are of one kind: two-stage models have one of more queries."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, layer in enumerate(layers):
        logits, boxes = layer["pred_logits"], layer["pred_boxes"]
        groups.setdefault((logits.shape, logits.dtype, boxes.shape, boxes.dtype), []).append(number)
    return groups.values()


def _pairs(query_of_target: Tensor, packed: PackedTargets | PaddedTargets, num_queries: int) -> Indices:
    """[N] queries of a layer to the matched (queries, targets) of each image, the queries ascending, on the device."""
    assert isinstance(packed, PackedTargets)  # see why_not_padded
    pairs = []
    for image in query_of_target.split(list(packed.num_targets)):
        queries, targets = image.sort()
        unmatched = max(len(image) - num_queries, 0)  # known without looking: every query has a target then
        pairs.append((queries[unmatched:], targets[unmatched:]))
    return pairs


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
