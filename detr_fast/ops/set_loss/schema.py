"""What the registrations with torch of ``set_loss`` and ``set_criterion`` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast.ops.set_loss.types import ClassLoss, CrossEntropy, Focal, Varifocal, result_sizes


def class_loss_as_schema(class_loss: ClassLoss) -> tuple[str, list[float], Tensor | None]:
    """In types that a schema knows: kind, numbers, weight."""
    if isinstance(class_loss, CrossEntropy):
        return "CrossEntropy", [class_loss.eos_coef], class_loss.weight
    return type(class_loss).__name__, list(class_loss), None


def class_loss_from_schema(kind: str, numbers: Sequence[float], weight: Tensor | None) -> ClassLoss:
    """The inverse of ``class_loss_as_schema``."""
    if kind == "CrossEntropy":
        return CrossEntropy(numbers[0], weight)
    return Focal(*numbers) if kind == "Focal" else Varifocal(*numbers)


def empty_results(logits: Sequence[Tensor], with_slopes: bool) -> tuple[Tensor, ...]:
    """Losses, metrics and slopes of a fake call."""
    shape = logits[0].shape if with_slopes else (0, 0, 0)
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    return tuple(logits[0].new_empty(size, dtype=dtype) for size in result_sizes(len(logits), *shape))


def keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], backend: str | None) -> None:
    """Save what ``scaled_slopes`` needs of an output that begins with that of ``set_loss``."""
    ctx.save_for_backward(*output[2:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes, ctx.backend = (inputs[0][0].dtype, inputs[1][0].dtype), backend


def scaled_slopes(ctx: Any, upstream: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of logits and boxes, a list of layers each."""
    gradients = torch.ops.detr_fast.set_loss_backward(upstream, *ctx.saved_tensors, ctx.backend)
    logits, boxes = (list(x.to(dtype).unbind()) for x, dtype in zip(gradients, ctx.dtypes, strict=True))
    return logits, boxes
