"""The losses by csrc/cpu/set_loss.cpp: one pass over the logits gives losses, metrics and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.matching_cost.native import NativeArguments
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets
from detr_fast.ops.set_loss.gradient import stacked
from detr_fast.ops.set_loss.types import ClassLoss, CrossEntropy, Focal, result_sizes

NO_COST = CostWeights(0.0, 0.0, 0.0)


def why_not(logits: Tensor) -> str | None:
    if logits.device.type != "cpu":
        return f"there is no native code for {logits.device.type} devices yet"
    return _native.why_not(logits.device)


def set_loss_native(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets,
    query_of_target: Tensor,
    class_loss: ClassLoss,
    num_boxes: Tensor,
    with_slopes: bool,
) -> tuple[Tensor, ...]:
    arguments = NativeArguments(logits, boxes, targets, NO_COST, None)
    results = LossResults(arguments, class_loss, num_boxes, with_slopes)
    query_of_target = query_of_target.contiguous()
    _native.module().set_loss_cpu(
        arguments.inputs,
        query_of_target.data_ptr(),
        results.num_boxes.data_ptr(),
        results.class_loss,
        results.addresses,
        torch.get_num_threads(),
    )
    return results.tensors


class LossResults:
    """Where losses and gradients are written, and what they take besides predictions and targets.

    Attributes:
        tensors: losses, metrics and slopes, see ``result_sizes``.
        addresses: theirs, 0 of those without elements.
        class_loss: enum detr_fast_class_loss_kind of csrc/cpu/set_loss.h, address of the weights, alpha, gamma.
        num_boxes: in the dtype that is computed in.
    """

    def __init__(self, arguments: NativeArguments, class_loss: ClassLoss, num_boxes: Tensor, with_slopes: bool) -> None:
        layers, *shape = arguments.sizes
        sizes = result_sizes(layers, *(shape if with_slopes else (0, 0, 0)))
        self.tensors = tuple(torch.empty(size, dtype=arguments.dtype) for size in sizes)
        self.addresses = [x.data_ptr() if x.numel() else 0 for x in self.tensors]
        self.num_boxes = num_boxes.to(arguments.dtype)
        if isinstance(class_loss, CrossEntropy):
            self._weight = class_loss.weights(shape[2], self.num_boxes)
            self.class_loss = (0, self._weight.data_ptr(), 0.0, 0.0)
        else:
            self.class_loss = (1 if isinstance(class_loss, Focal) else 2, 0, class_loss.alpha, class_loss.gamma)


def set_loss_backward_native(
    upstream: Tensor | Sequence[Tensor | None],
    logit_slope: Tensor,
    l1_slope: Tensor,
    giou_slope: Tensor,
    owned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and boxes. Of slopes that nobody else will ask for (``owned``) they take the place."""
    native = _native.load()
    if owned and native.quick is not None and native.quick.backward(upstream, logit_slope, l1_slope, giou_slope):
        return logit_slope, l1_slope
    upstream = stacked(upstream)
    logit_gradient, box_gradient = (x if owned else torch.empty_like(x) for x in (logit_slope, l1_slope))
    _native.module().set_loss_backward_cpu(
        upstream.dtype == torch.float64,
        (logit_slope[0].numel(), l1_slope[0].numel()),
        len(logit_slope),
        upstream.data_ptr(),
        (logit_slope.data_ptr(), l1_slope.data_ptr(), giou_slope.data_ptr()),
        logit_gradient.data_ptr(),
        box_gradient.data_ptr(),
        torch.get_num_threads(),
    )
    return logit_gradient, box_gradient
