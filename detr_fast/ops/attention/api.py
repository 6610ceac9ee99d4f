"""The public op, its checks, and its registration with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detr_fast.ops import _triton
from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.attention import sdpa
from detr_fast.ops.attention.native import attention_native, attention_native_backward
from detr_fast.ops.attention.native import why_not as native_why_not
from detr_fast.ops.attention.reference import attention_reference
from detr_fast.ops.attention.types import AttentionInputs, TokenOffsets, check_attention_inputs
from detr_fast.ops.dropout import Dropout

Gradients = tuple[Tensor, Tensor, Tensor]
# Of a head, that the Triton kernels take: their tiles hold whole heads.
LARGEST_HEAD = 128


def _run_triton(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    from detr_fast.ops.attention.triton_impl import attention_triton  # on demand: it imports Triton

    return attention_triton(inputs)


def _triton_gradients(*arguments: Any) -> Gradients:
    from detr_fast.ops.attention.triton_impl import attention_triton_backward  # on demand: it imports Triton

    return attention_triton_backward(*arguments)


def _why_not_triton(query: Tensor, seed: Tensor | None = None) -> str | None:
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take float32, bfloat16 and float16, got {query.dtype}"
    if query.shape[2] > LARGEST_HEAD:
        return f"the kernels take heads of up to {LARGEST_HEAD}, got {query.shape[2]}"
    return _triton.why_not(query.device)


# An implementation that is not in GRADIENTS returns the output, and torch differentiates it. One that is returns the
# output and what its backward wants besides, [H, Nq] (see ``statistics_like``): the logarithms of the softmax's sums.
OP = Op(
    name="attention",
    implementations=(
        Implementation("native", attention_native, native_why_not),
        Implementation("triton", _run_triton, _why_not_triton),
        Implementation("sdpa", sdpa.attention_sdpa, sdpa.why_not),
        Implementation("reference", attention_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 32, device=device),),
)

# (inputs, gradient of the output, output, statistics) to the gradients of query, key and value.
GRADIENTS: dict[str, Callable[[AttentionInputs, Tensor, Tensor, Tensor], Gradients]] = {
    "native": attention_native_backward,
    "triton": _triton_gradients,
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: TokenOffsets,
    key_offsets: TokenOffsets,
    *,
    scale: float | None = None,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every query's mean of its image's values, weighted by the softmax of its products with the keys.

    Scaled dot product attention in H heads (Vaswani et al. 2017, section 3.2) on tokens of B images that lie one behind
    the other: no padding is read, computed on, or written. A query of an image without keys gets zeros.

    Args:
        query: [Nq, H, E] of any float dtype. Like key and value of any strides with 1 in the last dimension, so that
            the parts of one projection's output go in as they lie; others are copied.
        key, value: [Nk, H, E], of the query's dtype.
        query_offsets, key_offsets: where each of the B images' tokens are.
        scale: what products are multiplied with; None: E^-0.5.
        dropout: which weights to drop, after the softmax; the others are scaled. See ``detr_fast.ops.dropout``.
        backend: "native", "triton", "sdpa" or "reference"; None takes the fastest that can run here. "sdpa" takes no
            dropout.

    Returns:
        [Nq, H, E] in the query's dtype. The softmax is computed in float32 at least.

    Raises:
        ValueError: a shape or dtype is not as above.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Differentiable once; the gradients are the same bits in every run ("sdpa": as far as PyTorch's are). On CUDA it does
    not wait for the device.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    inputs = AttentionInputs(query, key, value, query_offsets, key_offsets, scale, dropout)
    check_attention_inputs(inputs)
    if goes_through_dispatcher(query):
        out, _ = torch.ops.detr_fast.attention(*as_schema(inputs), backend)
        return out
    chosen = choose(inputs, backend)
    if chosen.name not in GRADIENTS:
        return chosen.run(inputs)
    return _Attention.apply(chosen, query, key, value, inputs[3:])


def choose(inputs: AttentionInputs, backend: str | None) -> Implementation:
    """The implementation that these inputs take."""
    return OP.choose(backend, inputs.query, *([] if inputs.dropout is None else [inputs.dropout.seed]))


def statistics_like(query: Tensor) -> Tensor:
    """[H, Nq] float32 (float64 for float64) for the logarithms of the softmax's sums, not filled."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((query.shape[1], query.shape[0]), dtype=dtype)


class _Attention(torch.autograd.Function):
    """The eager way: the implementation is called directly."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, chosen: Implementation, query: Tensor, key: Tensor, value: Tensor, rest: tuple[Any, ...]
    ) -> Tensor:
        out, statistics = chosen.run(AttentionInputs(query, key, value, *rest))
        ctx.save_for_backward(query, key, value, out, statistics)
        ctx.chosen, ctx.rest = chosen, rest
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, statistics = ctx.saved_tensors
        inputs = AttentionInputs(query, key, value, *ctx.rest)
        return None, *GRADIENTS[ctx.chosen.name](inputs, grad, out, statistics), None


INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor query_offsets, Tensor key_offsets, SymInt[] query_lengths, "
    "SymInt[] key_lengths, float scale, float p, Tensor? seed, str? backend=None"
)


def as_schema(inputs: AttentionInputs) -> tuple[object, ...]:
    """The arguments in the order and the types of INPUTS, but for the backend."""
    query, key, value, query_offsets, key_offsets, scale, dropout = inputs
    lengths = (list(query_offsets.lengths), list(key_offsets.lengths))
    p, seed = (0.0, None) if dropout is None else dropout
    return query, key, value, query_offsets.offsets, key_offsets.offsets, *lengths, scale, p, seed


def from_schema(*arguments: Any) -> AttentionInputs:
    """The inverse of ``as_schema``."""
    query, key, value, query_starts, key_starts, query_lengths, key_lengths, scale, p, seed = arguments
    offsets = TokenOffsets(tuple(query_lengths), query_starts), TokenOffsets(tuple(key_lengths), key_starts)
    return AttentionInputs(query, key, value, *offsets, scale, None if seed is None else Dropout(p, seed))


torch.library.define("detr_fast::attention", f"({INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "detr_fast::attention_backward",
    f"(Tensor grad, Tensor out, Tensor statistics, {INPUTS}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("detr_fast::attention", "CompositeExplicitAutograd")
def _attention(*arguments, backend=None) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    inputs, backend = from_schema(*arguments[:10]), _backend(arguments[10:], backend)
    chosen = choose(inputs, backend)
    if chosen.name in GRADIENTS:
        return chosen.run(inputs)
    return chosen.run(inputs).contiguous(), statistics_like(inputs.query).zero_()


@torch.library.impl("detr_fast::attention_backward", "CompositeExplicitAutograd")
def _attention_backward(grad, out, statistics, *arguments, backend=None) -> Gradients:  # type: ignore[no-untyped-def]
    inputs, backend = from_schema(*arguments[:10]), _backend(arguments[10:], backend)
    chosen = choose(inputs, backend)
    if chosen.name in GRADIENTS:
        return GRADIENTS[chosen.name](inputs, grad, out, statistics)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
        again = chosen.run(inputs._replace(query=q, key=k, value=v))
        grads = torch.autograd.grad(again, (q, k, v), grad, materialize_grads=True)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


def _backend(rest: tuple[Any, ...], backend: str | None) -> str | None:
    return rest[0] if rest else backend


@torch.library.register_fake("detr_fast::attention")
def _attention_fake(query, *rest, backend=None) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), statistics_like(query)


@torch.library.register_fake("detr_fast::attention_backward")
def _attention_backward_fake(grad, out, statistics, query, key, value, *rest, backend=None) -> Gradients:  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, query_lengths, key_lengths, scale, p, seed, backend = inputs
    ctx.save_for_backward(*tensors, seed, *output)
    ctx.rest = query_lengths, key_lengths, scale, p, backend


def _differentiate(ctx, grad, _) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    *tensors, seed, out, statistics = ctx.saved_tensors
    *numbers, backend = ctx.rest
    grads = torch.ops.detr_fast.attention_backward(grad, out, statistics, *tensors, *numbers, seed, backend)
    return *grads, *[None] * 8


torch.library.register_autograd("detr_fast::attention", _differentiate, setup_context=_save)
