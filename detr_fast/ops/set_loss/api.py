"""The public op, its checks, its gradient, and its registration with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast.ops import _triton
from detr_fast.ops._dispatch import (
    Implementation,
    Op,
    always_runs,
    goes_through_dispatcher,
    name_chooser,
    refuse_padded_targets,
)
from detr_fast.ops.matching_cost.types import PackedTargets, PaddedTargets
from detr_fast.ops.set_loss.gradient import with_gradients
from detr_fast.ops.set_loss.native import set_loss_backward_native, set_loss_native, why_not
from detr_fast.ops.set_loss.reference import set_loss_reference
from detr_fast.ops.set_loss.schema import (
    class_loss_as_schema,
    class_loss_from_schema,
    empty_results,
    keep_slopes,
    scaled_slopes,
)
from detr_fast.ops.set_loss.types import ClassLoss, CrossEntropy, SetLosses, check_set_loss_inputs


def _run_triton(*arguments: Any) -> tuple[Tensor, ...]:
    from detr_fast.ops.set_loss.triton_impl import set_loss_triton  # on demand: it imports Triton

    return set_loss_triton(*arguments)


def _run_backward_triton(upstream: Any, *slopes: Tensor, owned: bool = False) -> tuple[Tensor, Tensor]:
    from detr_fast.ops.set_loss.triton_impl import set_loss_backward_triton  # likewise

    return set_loss_backward_triton(upstream, *slopes)


OP = Op(
    name="set_loss",
    implementations=(
        Implementation("native", set_loss_native, why_not),
        Implementation("triton", _run_triton, lambda logits: _triton.why_not(logits.device)),
        Implementation("reference", set_loss_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, device=device),),
)
name_of_chosen = name_chooser(OP)
BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "native": set_loss_backward_native,
    "triton": _run_backward_triton,
}


def set_loss(
    logits: Sequence[Tensor] | Tensor,
    boxes: Sequence[Tensor] | Tensor,
    targets: PackedTargets | PaddedTargets,
    query_of_target: Tensor,
    class_loss: ClassLoss = CrossEntropy(),
    *,
    num_boxes: Tensor | float,
    backend: str | None = None,
) -> SetLosses:
    """The losses of matched predictions, for L decoder layers and all images at once, with their gradients.

    Carion et al. 2020, section 3.1, equation 2, and appendix A.2. All but "reference" compute the gradients along with
    the losses, in one pass over the logits; backward multiplies them by what comes from above.

    Args:
        logits: L tensors [B, Q, classes] of any float dtype (or one [L, B, Q, classes]), "no object" the last of the
            classes where ``class_loss`` is the cross-entropy.
        boxes: L tensors [B, Q, 4], cxcywh in [0, 1].
        targets: labels [N] in [0, classes), boxes [N, 4] cxcywh in [0, 1], B counts; or padded ones.
        query_of_target: [L, N] int64 in [-1, Q), as ``matching`` gives it: each target's query in its image, -1 for
            none and for padding. No query twice in an image.
        class_loss: CrossEntropy, Focal or Varifocal.
        num_boxes: what box losses are divided by, one number; not differentiated.
        backend: "reference", "native" or "triton"; None takes the fastest that can run here.

    Returns:
        See SetLosses; on the logits' device, in float32 (float64 for float64 logits).

    Raises:
        ValueError: a shape, dtype or device is not as above.
        IndexError: a label is out of range, and the tensors are on the CPU.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Differentiable in logits and boxes, once; by "reference" any number of times. Where a function has a corner the
    gradient is PyTorch's: half for each of two equal numbers of which one is the minimum, 1 at a clamp's bound, 0 at
    |0|. Deterministic, whatever the number of threads. Where all weights of the cross-entropy are 0 its mean is NaN. On
    CUDA "triton" does not wait for the device, nor look at labels: one out of range makes its layer's loss NaN.
    """
    logits, boxes = list(logits), list(boxes)
    check_set_loss_inputs(logits, boxes, targets, query_of_target, class_loss, num_boxes)
    losses, metrics = stacked_losses(logits, boxes, targets, query_of_target, class_loss, num_boxes, backend)
    return SetLosses(*losses.unbind(), *metrics.unbind())


def stacked_losses(
    logits: list[Tensor],
    boxes: list[Tensor],
    targets: PackedTargets | PaddedTargets,
    query_of_target: Tensor,
    class_loss: ClassLoss,
    num_boxes: Tensor | float,
    backend: str | None = None,
    *,
    singly: bool = False,
) -> tuple[Tensor, ...]:
    """As ``set_loss``, unchecked: the losses [3, L] and the metrics [2, L], in the order of SetLosses.

    ``singly``: the losses [3L], the metrics, and each of the losses as a tensor of its own.
    """
    if not isinstance(num_boxes, Tensor):
        num_boxes = torch.full((), num_boxes, dtype=torch.float32, device=logits[0].device)
    name = name_of_chosen(backend, logits[0])
    if isinstance(targets, PaddedTargets):
        refuse_padded_targets("set_loss", logits[0])
        if name == "triton":
            of_padded = (targets, query_of_target, class_loss, num_boxes)
            return with_gradients(
                lambda x, y, with_slopes: _run_triton(x, y, *of_padded, with_slopes),
                BACKWARD[name],
                logits,
                boxes,
                singly=singly,
            )
        targets = targets.trimmed()
        query_of_target = query_of_target[:, : len(targets.labels)]
    inputs = (targets, query_of_target, class_loss, num_boxes)
    if name == "reference":
        losses, metrics = set_loss_reference(logits, boxes, *inputs)
        return in_singles(losses, metrics) if singly else (losses, metrics)
    if goes_through_dispatcher(logits[0]):
        with_slopes = torch.is_grad_enabled() and any(x.requires_grad for x in (*logits, *boxes))
        results = torch.ops.detr_fast.set_loss(*as_schema(logits, boxes, *inputs), with_slopes, backend)
        return in_singles(results[0], results[1]) if singly else (results[0], results[1])
    run = OP.choose(backend, logits[0]).run
    return with_gradients(
        lambda x, y, with_slopes: run(x, y, *inputs, with_slopes), BACKWARD[name], logits, boxes, singly=singly
    )


def in_singles(losses: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """What is given, the losses flat, and each of them as a tensor of its own."""
    flat = losses.flatten()
    return flat, *others, *[x.clone() for x in flat.unbind()]


torch.library.define(
    "detr_fast::set_loss",
    "(Tensor[] logits, Tensor[] boxes, Tensor labels, Tensor target_boxes, SymInt[] num_targets, "
    "Tensor query_of_target, str kind, float[] numbers, Tensor? weight, Tensor num_boxes, bool with_slopes, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "detr_fast::set_loss_backward",
    "(Tensor upstream, Tensor logit_slope, Tensor l1_slope, Tensor giou_slope, str? backend) -> (Tensor, Tensor)",
)


def as_schema(
    logits: list[Tensor],
    boxes: list[Tensor],
    targets: PackedTargets,
    query_of_target: Tensor,
    class_loss: ClassLoss,
    num_boxes: Tensor,
) -> tuple[object, ...]:
    """The arguments in the order and the types of the op's schema."""
    return logits, boxes, *targets, query_of_target, *class_loss_as_schema(class_loss), num_boxes


@torch.library.impl("detr_fast::set_loss", "CompositeExplicitAutograd")
def _set_loss(  # type: ignore[no-untyped-def]
    logits,
    boxes,
    labels,
    target_boxes,
    num_targets,
    query_of_target,
    kind,
    numbers,
    weight,
    num_boxes,
    with_slopes,
    backend,
) -> tuple[Tensor, ...]:
    class_loss = class_loss_from_schema(kind, numbers, weight)
    targets = PackedTargets(labels, target_boxes, num_targets)
    run = OP.choose(backend, logits[0]).run
    return run(logits, boxes, targets, query_of_target, class_loss, num_boxes, with_slopes)


@torch.library.impl("detr_fast::set_loss_backward", "CompositeExplicitAutograd")
def _set_loss_backward(upstream, logit_slope, l1_slope, giou_slope, backend) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return BACKWARD[OP.choose(backend, logit_slope).name](upstream, logit_slope, l1_slope, giou_slope)


@torch.library.register_fake("detr_fast::set_loss")
def _set_loss_fake(logits, boxes, *rest) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    return empty_results(logits, with_slopes=rest[8])


@torch.library.register_fake("detr_fast::set_loss_backward")
def _set_loss_backward_fake(upstream, logit_slope, l1_slope, giou_slope, backend) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return torch.empty_like(logit_slope), torch.empty_like(l1_slope)


def _keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep_slopes(ctx, inputs, output, backend=inputs[-1])


def _scale_slopes(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return (*scaled_slopes(ctx, upstream), *[None] * 10)


torch.library.register_autograd("detr_fast::set_loss", _scale_slopes, setup_context=_keep_slopes)
