"""The public op, its checks, and its registration with torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.ops._dispatch import (
    Implementation,
    Op,
    always_runs,
    goes_through_dispatcher,
    name_chooser,
    refuse_padded_targets,
)
from detr_fast.ops.matching.api import Matching
from detr_fast.ops.matching_cost import api as matching_cost
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets, PaddedTargets, check_matching_inputs
from detr_fast.ops.set_criterion.native import set_criterion_native
from detr_fast.ops.set_criterion.reference import set_criterion_composed
from detr_fast.ops.set_loss import schema
from detr_fast.ops.set_loss.api import in_singles
from detr_fast.ops.set_loss.gradient import with_gradients
from detr_fast.ops.set_loss.native import set_loss_backward_native, why_not
from detr_fast.ops.set_loss.types import ClassLoss, CrossEntropy, SetLosses, check_loss_options

OP = Op(
    name="set_criterion",
    implementations=(
        Implementation("native", set_criterion_native, why_not),
        Implementation("composed", set_criterion_composed, always_runs),
        Implementation("reference", partial(set_criterion_composed, backend="reference"), always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, device=device),),
)
name_of_chosen = name_chooser(OP)


class MatchedLosses(NamedTuple):
    """The result of ``set_criterion``.

    Attributes:
        losses: see SetLosses.
        matching: see Matching.
    """

    losses: SetLosses
    matching: Matching


def set_criterion(
    logits: Sequence[Tensor] | Tensor,
    boxes: Sequence[Tensor] | Tensor,
    targets: PackedTargets | PaddedTargets,
    weights: CostWeights = CostWeights(),
    class_loss: ClassLoss = CrossEntropy(),
    *,
    num_boxes: Tensor | float,
    extra_cost: Sequence[Tensor] | Tensor | None = None,
    backend: str | None = None,
) -> MatchedLosses:
    """Match predictions with targets and compute the losses of that, for L decoder layers and all images at once.

    It is ``matching`` and then ``set_loss``, whose documentation holds here: costs that are no numbers, ties, empty
    images and those of more targets than queries, gradients, determinism. Carion et al. 2020, section 3.1.

    Args:
        logits: L tensors [B, Q, classes] of any float dtype (or one [L, B, Q, classes]), "no object" the last of the
            classes where ``class_loss`` is the cross-entropy.
        boxes: L tensors [B, Q, 4], cxcywh in [0, 1].
        targets: labels [N] in [0, classes), boxes [N, 4] cxcywh in [0, 1], B counts; or padded ones.
        weights: of the matching cost.
        class_loss: CrossEntropy, Focal or Varifocal.
        num_boxes: what box losses are divided by, one number; not differentiated.
        extra_cost: L tensors [N, Q] to add to the matching cost.
        backend: "native" is one call that reads the logits once, on the CPU; "composed" takes for each of the two ops
            what is fastest on the device; "reference" the references of both; None the first that can run here.

    Returns:
        See MatchedLosses.

    Raises:
        ValueError: a shape, dtype or device is not as above.
        IndexError: a label is out of range, and the tensors are on the CPU.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Differentiable as ``set_loss`` is. It waits for the device where one of the two ops does, which neither the CUDA
    matching nor the Triton losses do: together three launches forward, for up to 8 layers and 32 images.
    """
    logits, boxes = list(logits), list(boxes)
    extra = None if extra_cost is None else list(extra_cost)
    check_matching_inputs(logits, boxes, targets, extra)
    check_loss_options(logits[0], class_loss, num_boxes)
    losses, metrics, *matched = stacked_results(logits, boxes, targets, weights, class_loss, num_boxes, extra, backend)
    return MatchedLosses(SetLosses(*losses.unbind(), *metrics.unbind()), Matching(*matched))


def stacked_results(
    logits: list[Tensor],
    boxes: list[Tensor],
    targets: PackedTargets | PaddedTargets,
    weights: CostWeights,
    class_loss: ClassLoss,
    num_boxes: Tensor | float,
    extra_cost: list[Tensor] | None = None,
    backend: str | None = None,
    *,
    singly: bool = False,
) -> tuple[Tensor, ...]:
    """As ``set_criterion``: losses [3, L] and metrics [2, L] in SetLosses' order, then Matching's.

    ``class_loss`` and ``num_boxes`` are not checked. ``singly``: the losses [3L], and at the end each of them as a
    tensor of its own.
    """
    if not isinstance(num_boxes, Tensor):
        num_boxes = torch.full((), num_boxes, dtype=torch.float32, device=logits[0].device)
    name = name_of_chosen(backend, logits[0])
    if isinstance(targets, PaddedTargets):
        refuse_padded_targets("set_criterion", logits[0])
        if name != "native":
            padded = (targets, weights, extra_cost, class_loss, num_boxes)
            return OP.choose(name, logits[0]).run(logits, boxes, *padded, singly=singly)  # type: ignore[no-any-return]
        check_matching_inputs(logits, boxes, targets, extra_cost)
        packed = targets.trimmed()  # on the CPU
        extra_cost = None if extra_cost is None else [x[: len(packed.labels)] for x in extra_cost]
        options = (weights, class_loss, num_boxes, extra_cost, name)
        losses, metrics, queries, *rest = stacked_results(logits, boxes, packed, *options, singly=singly)
        return losses, metrics, targets.padded(queries), *rest
    inputs = (targets, weights, extra_cost, class_loss, num_boxes)
    if name != "native":
        return OP.choose(name, logits[0]).run(logits, boxes, *inputs, singly=singly)  # type: ignore[no-any-return]
    if goes_through_dispatcher(logits[0]):
        check_matching_inputs(logits, boxes, targets, extra_cost)
        with_slopes = torch.is_grad_enabled() and any(x.requires_grad for x in (*logits, *boxes))
        found = torch.ops.detr_fast.set_criterion(*as_schema(logits, boxes, *inputs), with_slopes)
        results = (*found[:2], *found[5:])
        return in_singles(*results) if singly else results
    return with_gradients(
        lambda x, y, with_slopes: set_criterion_native(x, y, *inputs, with_slopes),
        set_loss_backward_native,
        logits,
        boxes,
        singly=singly,
    )


torch.library.define(
    "detr_fast::set_criterion",
    "(Tensor[] logits, Tensor[] boxes, Tensor labels, Tensor target_boxes, SymInt[] num_targets, float[] weights, "
    "bool focal, Tensor[] extra_cost, str kind, float[] numbers, Tensor? weight, Tensor num_boxes, bool with_slopes) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def as_schema(
    logits: list[Tensor],
    boxes: list[Tensor],
    targets: PackedTargets,
    weights: CostWeights,
    extra_cost: list[Tensor] | None,
    class_loss: ClassLoss,
    num_boxes: Tensor,
) -> tuple[object, ...]:
    """The arguments in the order and the types of the op's schema."""
    of_matching = matching_cost.as_schema(logits, boxes, targets, weights, extra_cost)
    return *of_matching, *schema.class_loss_as_schema(class_loss), num_boxes


@torch.library.impl("detr_fast::set_criterion", "CompositeExplicitAutograd")
def _set_criterion(*arguments: Any) -> tuple[Tensor, ...]:
    *of_matching, kind, numbers, weight, num_boxes, with_slopes = arguments
    inputs = matching_cost.from_schema(*of_matching)
    return set_criterion_native(*inputs, schema.class_loss_from_schema(kind, numbers, weight), num_boxes, with_slopes)


@torch.library.register_fake("detr_fast::set_criterion")
def _set_criterion_fake(*arguments: Any) -> tuple[Tensor, ...]:
    logits, _, labels, *_, with_slopes = arguments
    losses = schema.empty_results(logits, with_slopes)
    query_of_target = logits[0].new_empty((len(logits), labels.shape[0]), dtype=torch.int64)
    return *losses, query_of_target, logits[0].new_empty((len(logits), logits[0].shape[0]), dtype=torch.int64)


def _scale_slopes(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return *schema.scaled_slopes(ctx, upstream), *[None] * 5, [None] * ctx.extra_costs, *[None] * 5


def _keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    schema.keep_slopes(ctx, inputs, output, backend="native")
    ctx.extra_costs = len(inputs[7])  # a list takes a list of gradients


torch.library.register_autograd("detr_fast::set_criterion", _scale_slopes, setup_context=_keep_slopes)
