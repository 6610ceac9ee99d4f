"""The public op, its checks, its gradient, and its registration with torch."""

# torch's decorators and Functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops import _triton
from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.dropout import Dropout, check_dropout, scale_of
from detr_fast.ops.relu_dropout import native
from detr_fast.ops.relu_dropout.reference import relu_dropout_reference, relu_dropout_reference_backward

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _triton_forward(*arguments: Any) -> Tensor:
    from detr_fast.ops.relu_dropout.triton_impl import relu_dropout_triton  # on demand: it imports Triton

    return relu_dropout_triton(*arguments)


def _triton_backward(*arguments: Any) -> Tensor:
    from detr_fast.ops.relu_dropout.triton_impl import relu_dropout_triton_backward

    return relu_dropout_triton_backward(*arguments)


OP = Op(
    name="relu_dropout",
    implementations=(
        Implementation("native", native.relu_dropout_native, native.why_not),
        Implementation("triton", _triton_forward, lambda x: _triton.why_not(x.device)),
        Implementation("reference", relu_dropout_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 2048, device=device),),
)
BACKWARD: dict[str, Callable[..., Tensor]] = {
    "native": native.relu_dropout_native_backward,
    "triton": _triton_backward,
    "reference": relu_dropout_reference_backward,
}


def relu_dropout(
    x: Tensor, dropout: Dropout | None = None, *, overwrite: bool = False, backend: str | None = None
) -> Tensor:
    """``dropout(relu(x))``. What the backward needs is in the result alone: no mask is stored.

    Args:
        x: [..., D] float.
        dropout: row and column of an element are its place in x as [N, D]. None drops nothing, and is torch's ReLU.
        overwrite: whether the result may take the memory of x, as ``inplace`` of torch's ReLU.
        backend: "native", "triton" or "reference"; None takes the fastest that can run here.

    Returns:
        As x. NaN where x is and is kept.

    Raises:
        ValueError: a shape, dtype or device is not as above.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Differentiable once: the gradient flows where the result is positive. Nothing waits for the device.
    """
    if x.dim() == 0 or x.shape[-1] == 0 or x.dtype not in DTYPES:
        expected = "float32, float64, bfloat16 or float16 [..., D] with D at least 1"
        raise ValueError(f"x must be {expected}, got {x.dtype} {list(x.shape)}")
    check_dropout(dropout, x.device)
    if goes_through_dispatcher(x):
        if dropout is None:
            return F.relu(x)
        return torch.ops.detr_fast.relu_dropout(x, dropout.seed, dropout.p, backend)
    chosen = OP.choose(backend, x)
    if dropout is None or dropout.threshold == 0:
        return F.relu(x, inplace=overwrite)
    return _ReluDropout.apply(x, dropout.seed, dropout.p, overwrite, chosen)


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, p, overwrite, chosen):
        y = chosen.run(_matrix(x), Dropout(p, seed), overwrite and x.is_contiguous()).view(x.shape)
        if overwrite and x.is_contiguous():
            ctx.mark_dirty(x)
            y = x
        ctx.save_for_backward(y)
        ctx.p, ctx.backend = p, chosen.name
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        (y,) = ctx.saved_tensors
        return _backward(grad_y, y, ctx.p, ctx.backend), None, None, None, None


def _backward(grad_y: Tensor, y: Tensor, p: float, backend: str) -> Tensor:
    return BACKWARD[backend](_matrix(grad_y), _matrix(y), scale_of(p)).view(y.shape)


def _matrix(x: Tensor) -> Tensor:
    """[..., D] to [N, D] with contiguous columns."""
    matrix = x.detach().reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


torch.library.define("detr_fast::relu_dropout", "(Tensor x, Tensor seed, float p, str? backend=None) -> Tensor")
torch.library.define(
    "detr_fast::relu_dropout_backward", "(Tensor grad_y, Tensor y, float p, str? backend=None) -> Tensor"
)


@torch.library.impl("detr_fast::relu_dropout", "CompositeExplicitAutograd")
def _node(x, seed, p, backend=None):
    return OP.choose(backend, x).run(_matrix(x), Dropout(p, seed)).view(x.shape)


@torch.library.register_fake("detr_fast::relu_dropout")
def _node_fake(x, seed, p, backend=None):
    return x.new_empty(x.shape)


@torch.library.impl("detr_fast::relu_dropout_backward", "CompositeExplicitAutograd")
def _backward_node(grad_y, y, p, backend=None):
    return _backward(grad_y, y, p, OP.choose(backend, y).name)


@torch.library.register_fake("detr_fast::relu_dropout_backward")
def _backward_node_fake(grad_y, y, p, backend=None):
    return y.new_empty(y.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output)
    _, _, ctx.p, ctx.backend = inputs


def _node_gradient(ctx, grad_y):
    (y,) = ctx.saved_tensors
    return torch.ops.detr_fast.relu_dropout_backward(grad_y, y, ctx.p, ctx.backend), None, None, None


torch.library.register_autograd("detr_fast::relu_dropout", _node_gradient, setup_context=_setup_context)
