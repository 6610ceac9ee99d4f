"""Losses whose gradients are computed along with them, as autograd sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def with_gradients(
    run: Callable[..., tuple[Tensor, ...]],
    scale: Callable[..., tuple[Tensor, Tensor]],
    logits: list[Tensor],
    boxes: list[Tensor],
) -> tuple[Tensor, ...]:
    """What ``run`` gives but the slopes, differentiable in logits and boxes.

    Args:
        run: (logits, boxes, with_slopes) to losses, metrics, slopes of logits, L1 and GIoU, and anything more.
        scale: (gradient of the losses, *slopes, owned=) to the gradients of all layers' logits and boxes; the slopes
            may be written to where they are ``owned``.
    """
    return _ScaledBackward.apply(len(logits), run, scale, torch.is_grad_enabled(), *logits, *boxes)  # type: ignore[no-any-return]


class _ScaledBackward(torch.autograd.Function):
    """Gradients are computed forward and scaled backward."""

    @staticmethod
    def forward(
        ctx: Any, layers: int, run: Any, scale: Any, with_slopes: bool, *predictions: Tensor
    ) -> tuple[Tensor, ...]:
        with_slopes = with_slopes and any(ctx.needs_input_grad)
        losses, metrics, *rest = run(predictions[:layers], predictions[layers:], with_slopes)
        ctx.save_for_backward(*rest[:3])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(metrics, *rest[3:])
        ctx.scale, ctx.dtypes = scale, (predictions[0].dtype, predictions[layers].dtype)
        return losses, metrics, *rest[3:]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        slopes = ctx.saved_tensors
        if upstream is None:
            return (None,) * (4 + 2 * len(slopes[0]))
        gradients = ctx.scale(upstream, *slopes, owned=not _graph_is_kept())
        layers = zip(gradients, ctx.dtypes, strict=True)
        return (None,) * 4 + tuple(x for gradient, dtype in layers for x in gradient.to(dtype).unbind())


def _graph_is_kept() -> bool:
    """Whether backward may run again, so that what was saved for it has to stay; in doubt, yes."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # torch has no public way to ask
    return True if ask is None else bool(ask())
