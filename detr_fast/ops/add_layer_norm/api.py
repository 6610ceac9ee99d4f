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
from detr_fast.ops.add_layer_norm import native
from detr_fast.ops.add_layer_norm.reference import add_layer_norm_reference, add_layer_norm_reference_backward
from detr_fast.ops.add_layer_norm.types import Gradients, Inputs, Normalized
from detr_fast.ops.dropout import Dropout, check_dropout

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A program of the Triton kernels holds whole rows in registers.
MOST_TRITON_COLUMNS = 2048
# Up to so many elements on a CPU, without dropout and gradients, torch's own sums and layer norm are done sooner: 100
# rows of 256 columns take 32 microseconds and the native code, called from Python, 45; 850 rows 103 and 118; with 3400
# rows it is 0.74 times as long as torch.
FEW_ELEMENTS = 1 << 18


def _why_not_triton(x: Tensor) -> str | None:
    if x.shape[-1] > MOST_TRITON_COLUMNS:
        return f"the Triton kernels take rows of at most {MOST_TRITON_COLUMNS} columns, got {x.shape[-1]}"
    return _triton.why_not(x.device)


def _triton_forward(*arguments: Any) -> Normalized:
    from detr_fast.ops.add_layer_norm.triton_impl import add_layer_norm_triton

    return add_layer_norm_triton(*arguments)


def _triton_backward(*arguments: Any) -> Gradients:
    from detr_fast.ops.add_layer_norm.triton_impl import add_layer_norm_triton_backward

    return add_layer_norm_triton_backward(*arguments)


OP = Op(
    name="add_layer_norm",
    implementations=(
        Implementation("native", native.add_layer_norm_native, native.why_not),
        Implementation("triton", _triton_forward, _why_not_triton),
        Implementation("reference", add_layer_norm_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 256, device=device),),
)
BACKWARD: dict[str, Callable[..., Gradients]] = {
    "native": native.add_layer_norm_native_backward,
    "triton": _triton_backward,
    "reference": add_layer_norm_reference_backward,
}


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout: Dropout | None = None,
    pos: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of ``residual + dropout(x)``: the end of every block of a post-norm transformer, in one pass.

    Args:
        x: [..., D] float, what attention or the feed-forward network gives.
        residual: as x, of any float dtype.
        weight, bias: [D] of one float dtype.
        eps: added to the variance.
        dropout: on x, before the sum; row and column of an element are its place in x as [N, D].
        pos: [..., D], the last dimensions of x, a position that the next block adds to the result.
        backend: "native", "triton" or "reference"; None takes the fastest that can run here.

    Returns:
        y as x; with ``pos`` (y, y + pos). Of the promoted dtype of x and residual, computed in float32 at least and
        rounded once: y + pos is not the sum of a rounded y, but for float32 in few rows without gradients on a CPU.

    Raises:
        ValueError: a shape, dtype or device is not as above.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Differentiable once in every tensor. The gradients do not depend on the number of threads, nor on the run.
    Nothing waits for the device.
    """
    _check(x, residual, weight, bias, pos)
    check_dropout(dropout, x.device)
    if dropout is not None and dropout.threshold == 0:
        dropout = None
    seed, p = (None, 0.0) if dropout is None else (dropout.seed, dropout.p)
    if goes_through_dispatcher(x):
        y, y_pos, *_ = torch.ops.detr_fast.add_layer_norm(x, residual, weight, bias, pos, seed, p, eps, backend)
    elif _needs_gradient(x, residual, weight, bias, pos):
        y, y_pos = _AddLayerNorm.apply(x, residual, weight, bias, pos, seed, p, eps, backend)
    elif backend is None and seed is None and _are_few_floats(x, residual, weight, pos):
        y = F.layer_norm(residual + x, weight.shape, weight, bias, eps)
        y_pos = None if pos is None else y + pos
    else:
        y, y_pos = _as_x(x, _forward(x, residual, weight, bias, pos, seed, p, eps, backend))
    return y if pos is None else (y, y_pos)


def _are_few_floats(x: Tensor, *others: Tensor | None) -> bool:
    floats = all(t is None or t.dtype == torch.float32 for t in (x, *others))
    return x.device.type == "cpu" and x.numel() <= FEW_ELEMENTS and floats


def _needs_gradient(*tensors: Tensor | None) -> bool:
    # Without, a Function is left out, which takes as long as a hundred rows of DETR's on the CPU.
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _as_x(x: Tensor, normalized: Normalized) -> tuple[Tensor, Tensor | None]:
    y, y_pos = normalized[:2]
    return y.view(x.shape), None if y_pos is None else y_pos.view(x.shape)


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, pos: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., D] with D at least 1, got {list(x.shape)}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x, got {list(residual.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if list(vector.shape) != [x.shape[-1]] or vector.dtype != weight.dtype:
            expected = f"{weight.dtype} [{x.shape[-1]}]"
            raise ValueError(f"{name} must be {expected}, got {vector.dtype} {list(vector.shape)}")
    if pos is not None and (pos.dim() == 0 or x.shape[x.dim() - pos.dim() :] != pos.shape):
        raise ValueError(f"pos must be the last dimensions of x {list(x.shape)}, got {list(pos.shape)}")
    device = x.device
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias), ("pos", pos)):
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, where x is, got {tensor.device}")


def _forward(x, residual, weight, bias, pos, seed, p, eps, backend) -> Normalized:
    columns = x.shape[-1]
    positions = None if pos is None else pos.reshape(-1, columns)
    return OP.choose(backend, x).run(_inputs(x, residual, weight, seed, p), bias, positions, eps)


def _backward(grad_y, grad_y_pos, x, residual, weight, mean, rstd, seed, p, backend) -> Gradients:
    grads = (None if g is None else g.reshape(-1, x.shape[-1]) for g in (grad_y, grad_y_pos))
    chosen = OP.choose(backend, x)
    return BACKWARD[chosen.name](_inputs(x, residual, weight, seed, p), mean, rstd, *grads)


def _inputs(x, residual, weight, seed, p) -> Inputs:
    dropout = None if seed is None else Dropout(p, seed)
    return Inputs(x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1]), weight, dropout)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, pos, seed, p, eps, backend):
        normalized = _forward(x, residual, weight, bias, pos, seed, p, eps, backend)
        ctx.save_for_backward(x, residual, weight, normalized.mean, normalized.rstd, seed)
        ctx.pos = None if pos is None else (pos.shape, pos.dtype)
        ctx.p, ctx.backend = p, backend
        ctx.set_materialize_grads(False)
        return _as_x(x, normalized)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_y_pos):
        if grad_y is None and grad_y_pos is None:
            return (None,) * 9
        x, residual, weight, mean, rstd, seed = ctx.saved_tensors
        grads = _backward(grad_y, grad_y_pos, x, residual, weight, mean, rstd, seed, ctx.p, ctx.backend)
        grad_x, grad_residual = grads.residual if grads.x is None else grads.x, grads.residual
        grad_pos = _pos_gradient(grad_y_pos, ctx.pos)
        shape = x.shape
        return grad_x.view(shape), grad_residual.view(shape), grads.weight, grads.bias, grad_pos, *(None,) * 4


def _pos_gradient(grad_y_pos: Tensor | None, pos: tuple[torch.Size, torch.dtype] | None) -> Tensor | None:
    """Of a position that several images share: the sum over them."""
    if grad_y_pos is None or pos is None:
        return None
    shape, dtype = pos
    shared_by = tuple(range(grad_y_pos.dim() - len(shape)))
    if not shared_by:
        return grad_y_pos.to(dtype)
    return grad_y_pos.sum(shared_by, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)


torch.library.define(
    "detr_fast::add_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? pos, Tensor? seed, float p, float eps, "
    "str? backend=None) -> (Tensor y, Tensor y_pos, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "detr_fast::add_layer_norm_backward",
    "(Tensor? grad_y, Tensor? grad_y_pos, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd, "
    "Tensor? seed, float p, str? backend=None) -> (Tensor x, Tensor residual, Tensor weight, Tensor bias)",
)


# A node gives tensors, none of them twice: an empty one stands for y_pos without pos, and for the gradient of x where
# it is that of residual.
@torch.library.impl("detr_fast::add_layer_norm", "CompositeExplicitAutograd")
def _node(x, residual, weight, bias, pos, seed, p, eps, backend=None):
    y, y_pos, mean, rstd = _forward(x, residual, weight, bias, pos, seed, p, eps, backend)
    return y.view(x.shape), y.new_empty(0) if y_pos is None else y_pos.view(x.shape), mean, rstd


@torch.library.register_fake("detr_fast::add_layer_norm")
def _node_fake(x, residual, weight, bias, pos, seed, p, eps, backend=None):
    inputs = _inputs(x, residual, weight, seed, p)
    y = x.new_empty(x.shape, dtype=inputs.dtype)
    mean, rstd = (x.new_empty(inputs.x.shape[0], dtype=inputs.compute_dtype) for _ in range(2))
    return y, y.new_empty(0) if pos is None else torch.empty_like(y), mean, rstd


@torch.library.impl("detr_fast::add_layer_norm_backward", "CompositeExplicitAutograd")
def _backward_node(grad_y, grad_y_pos, x, residual, weight, mean, rstd, seed, p, backend=None):
    grads = _backward(grad_y, grad_y_pos, x, residual, weight, mean, rstd, seed, p, backend)
    grad_x = x.new_empty(0) if grads.x is None else grads.x.view(x.shape)
    return grad_x, grads.residual.view(x.shape), grads.weight, grads.bias


@torch.library.register_fake("detr_fast::add_layer_norm_backward")
def _backward_node_fake(grad_y, grad_y_pos, x, residual, weight, mean, rstd, seed, p, backend=None):
    one_gradient = _inputs(x, residual, weight, seed, p).one_gradient
    grad_x = x.new_empty(0 if one_gradient else x.shape)
    return grad_x, residual.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _, pos, seed, ctx.p, _, ctx.backend = inputs
    ctx.save_for_backward(x, residual, weight, *output[2:], seed)
    ctx.pos = None if pos is None else (pos.shape, pos.dtype)
    ctx.set_materialize_grads(False)


def _node_gradient(ctx, grad_y, grad_y_pos, grad_mean, grad_rstd):
    if ctx.pos is None:
        grad_y_pos = None
    if grad_y is None and grad_y_pos is None:
        return (None,) * 9
    x, residual, weight, mean, rstd, seed = ctx.saved_tensors
    grad_x, grad_residual, grad_weight, grad_bias = torch.ops.detr_fast.add_layer_norm_backward(
        grad_y, grad_y_pos, x, residual, weight, mean, rstd, seed, ctx.p, ctx.backend
    )
    grad_x = grad_residual if _inputs(x, residual, weight, seed, ctx.p).one_gradient else grad_x
    return grad_x, grad_residual, grad_weight, grad_bias, _pos_gradient(grad_y_pos, ctx.pos), *(None,) * 4


torch.library.register_autograd("detr_fast::add_layer_norm", _node_gradient, setup_context=_setup_context)
