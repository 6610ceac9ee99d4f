"""The public op and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.conv.native import ALGORITHMS, conv_native, why_not
from detr_fast.ops.conv.reference import conv_reference
from detr_fast.ops.conv.types import ConvInputs, PackedConv

OP = Op(
    name="conv",
    implementations=(
        Implementation("native", conv_native, why_not),
        Implementation("reference", conv_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, 1, device=device),),
)


def conv(
    x: Tensor,
    packed: PackedConv,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
    algorithm: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A convolution with its bias, what is added to it, and the ReLU after it, in inference.

    Maps lie in memory as [B, H, W, C] (``torch.channels_last``); ``x`` and ``residual`` that do not are copied.

    Args:
        x: [B, C, H, W] float.
        packed: the weight [K, C, R, S], bias, stride, padding and dilation.
        residual: [B, K, H', W'], what is added before the ReLU; may be ``out``.
        relu: whether negative numbers become zeros. NaN stays.
        out: [B, K, H', W'] channels last, where to write; may not share memory with ``x``.
        algorithm: "gemm", of "native"; None takes the fastest for this layer.
        backend: "native" or "reference"; None takes the fastest that can run here. What is compiled or exported takes
            the reference, which torch can see into.

    Returns:
        [B, K, H', W'] channels last: ``out`` where it is given. float32 sums are formed in float32.

    Raises:
        ValueError: a shape, dtype or layout is not as above, or a gradient would be needed.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. On CUDA it does not wait for the device.
    """
    inputs = ConvInputs(x, packed, residual, relu, out, algorithm)
    _check(inputs)
    if goes_through_dispatcher(x):
        return conv_reference(inputs)
    chosen = OP.choose(backend, x)
    return chosen.run(inputs)


def _check(inputs: ConvInputs) -> None:
    x, packed, residual, _, out, algorithm = inputs
    weight = packed.weight
    if x.ndim != 4 or x.shape[1] != weight.shape[1] or 0 in x.shape[1:]:
        raise ValueError(f"x must be [B, {weight.shape[1]}, H, W] with pixels, got {list(x.shape)}")
    if x.dtype != weight.dtype or x.device != weight.device:
        wanted, got = f"{weight.dtype} on {weight.device}", f"{x.dtype} on {x.device}"
        raise ValueError(f"x must be {wanted}, as the weight is, got {got}")
    size = packed.out_size(*x.shape[2:])
    if min(size) < 1:
        raise ValueError(f"x must be at least as large as the kernel of {packed}, got {list(x.shape)}")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be None or one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    shape = [len(x), len(weight), *size]
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None and (list(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device):
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must be {x.dtype} {shape} on {x.device}, got {got}")
    _check_memory(x, residual, out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, out)):
        raise ValueError("x, residual and out must not require a gradient (conv has none: use torch.no_grad())")


def _check_memory(x: Tensor, residual: Tensor | None, out: Tensor | None) -> None:
    if out is None or goes_through_dispatcher(x):
        return
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out must be channels last (torch.channels_last), got strides {out.stride()}")
    if _overlap(x, out):
        raise ValueError("out must not share memory with x")
    if residual is not None and residual.data_ptr() != out.data_ptr() and _overlap(residual, out):
        raise ValueError("out must be residual itself or not share memory with it")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from a tensor's first number to its last one overlaps another's."""
    (a_first, a_end), (b_first, b_end) = _span(a), _span(b)
    return a_first < b_end and b_first < a_end


def _span(tensor: Tensor) -> tuple[int, int]:
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size()
