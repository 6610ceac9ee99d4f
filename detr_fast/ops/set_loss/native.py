"""The losses by csrc/cpu/set_loss.cpp: one pass over the logits gives losses, metrics and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.matching_cost.native import NativeArguments
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets
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
    layers, dtype = len(logits), arguments.dtype
    shape = logits[0].shape if with_slopes else (0, 0, 0)
    results = tuple(torch.empty(size, dtype=dtype) for size in result_sizes(layers, *shape))
    query_of_target, num_boxes = query_of_target.contiguous(), num_boxes.to(dtype)
    kind, weight, alpha, gamma = as_numbers(class_loss, logits[0].shape[2], num_boxes)
    _native.module().set_loss_cpu(
        arguments.inputs,
        query_of_target.data_ptr(),
        num_boxes.data_ptr(),
        kind,
        weight.data_ptr() if weight is not None else 0,
        alpha,
        gamma,
        [x.data_ptr() if x.numel() else 0 for x in results],
        torch.get_num_threads(),
    )
    return results


def as_numbers(class_loss: ClassLoss, classes: int, like: Tensor) -> tuple[int, Tensor | None, float, float]:
    """enum detr_fast_class_loss_kind of csrc/cpu/set_loss.h, weights, alpha, gamma."""
    if isinstance(class_loss, CrossEntropy):
        return 0, class_loss.weights(classes, like), 0.0, 0.0
    return (1 if isinstance(class_loss, Focal) else 2), None, class_loss.alpha, class_loss.gamma


def set_loss_backward_native(
    upstream: Tensor, logit_slope: Tensor, l1_slope: Tensor, giou_slope: Tensor, owned: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and boxes. Slopes that nobody else will ask for (``owned``) are given away, times 1."""
    native, upstream = _native.module(), upstream.contiguous()
    is_double = upstream.dtype == torch.float64
    give = owned and native.set_loss_keeps_logit_slope(is_double, len(logit_slope), upstream.data_ptr())
    logit_gradient = logit_slope if give else torch.empty_like(logit_slope)
    box_gradient = torch.empty_like(l1_slope)
    native.set_loss_backward_cpu(
        is_double,
        (logit_slope[0].numel(), l1_slope[0].numel()),
        len(logit_slope),
        upstream.data_ptr(),
        (logit_slope.data_ptr(), l1_slope.data_ptr(), giou_slope.data_ptr()),
        0 if give else logit_gradient.data_ptr(),
        box_gradient.data_ptr(),
        torch.get_num_threads(),
    )
    return logit_gradient, box_gradient
