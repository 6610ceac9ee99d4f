"""Losses whose gradients are computed along with them, as autograd sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def with_gradients(
    run: Callable[..., tuple[Tensor, ...]],
    scale: Callable[..., tuple[Tensor, Tensor]],
    logits: list[Tensor],
    boxes: list[Tensor],
    *,
    singly: bool = False,
) -> tuple[Tensor, ...]:
    """What ``run`` gives but the slopes, differentiable in logits and boxes.

    Args:
        run: (logits, boxes, with_slopes) to losses, metrics, slopes of logits, L1 and GIoU, and anything more.
        scale: (gradient of the losses, *slopes, owned=) to the gradients of all layers' logits and boxes; the slopes
            may be written to where they are ``owned``. The gradient is a tensor, or a tuple of single numbers and
            None for zero (see ``stacked``).
        singly: give ``losses.flatten()`` in the place of the losses, and at the end each of its numbers as a tensor of
            its own.
    """
    return _ScaledBackward.apply(len(logits), run, scale, torch.is_grad_enabled(), singly, *logits, *boxes)  # type: ignore[no-any-return]


def stacked(upstream: Tensor | Sequence[Tensor | None]) -> Tensor:
    """Gradients of single numbers, None being zero, as one tensor, which may be there already."""
    if isinstance(upstream, Tensor):
        return upstream.contiguous()
    zero = next(x for x in upstream if x is not None).new_zeros(())
    return torch.stack([zero if x is None else x for x in upstream])


class _ScaledBackward(torch.autograd.Function):
    """Gradients are computed forward and scaled backward."""

    @staticmethod
    def forward(
        ctx: Any, layers: int, run: Any, scale: Any, with_slopes: bool, singly: bool, *predictions: Tensor
    ) -> tuple[Tensor, ...]:
        with_slopes = with_slopes and any(ctx.needs_input_grad)
        losses, metrics, *rest = run(predictions[:layers], predictions[layers:], with_slopes)
        ctx.save_for_backward(*rest[:3])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(metrics, *rest[3:])
        ctx.scale, ctx.dtypes = scale, (predictions[0].dtype, predictions[layers].dtype)
        ctx.first_number = len(rest) - 2  # among all results but the losses
        if not singly:
            return losses, metrics, *rest[3:]
        losses = losses.flatten()
        # ``data``, because autograd lets nobody change a view in place (``losses[name] *= weight``).
        return losses, metrics, *rest[3:], *[x.data for x in losses.unbind()]

    @staticmethod
    def backward(ctx: Any, upstream: Any, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes, of_numbers = ctx.saved_tensors, others[ctx.first_number :]
        if any(x is not None for x in of_numbers):
            upstream = of_numbers if upstream is None else upstream + stacked(of_numbers)
        if upstream is None:
            return (None,) * (5 + 2 * len(slopes[0]))
        gradients = ctx.scale(upstream, *slopes, owned=not _graph_is_kept())
        layers = zip(gradients, ctx.dtypes, strict=True)
        return (None,) * 5 + tuple(x for gradient, dtype in layers for x in gradient.to(dtype).unbind())


def _graph_is_kept() -> bool:
    """Whether backward may run again, so that what was saved for it has to stay; in doubt, yes."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # torch has no public way to ask
    return True if ask is None else bool(ask())
