"""The public ops and their checks."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.conv.types import check_no_gradient, check_place
from detr_fast.ops.conv_int8.native import INSTRUCTIONS, conv_int8_native, has_instructions, to_bytes_native, why_not
from detr_fast.ops.conv_int8.reference import conv_int8_reference, to_bytes_reference
from detr_fast.ops.conv_int8.types import ConvInt8Inputs, PackedConvInt8

OP = Op(
    name="conv_int8",
    implementations=(
        Implementation("native", conv_int8_native, why_not),
        Implementation("reference", conv_int8_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, 1, dtype=torch.uint8, device=device),),
)
TO_BYTES = Op(
    name="to_bytes",
    implementations=(
        Implementation("native", to_bytes_native, why_not),
        Implementation("reference", to_bytes_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, 1, device=device),),
)


def conv_int8(
    x: Tensor,
    packed: PackedConvInt8,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
    instructions: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A convolution of bytes with signed bytes, with its bias, what is added to it, and the ReLU after it.

    Sums of products are exact, in 32 bits. Maps lie in memory as [B, H, W, C] (``torch.channels_last``); those that are
    read and do not are copied.

    Args:
        x: [B, C, H, W] uint8; what is outside of the map is 0.
        packed: the weight, what bytes stand for, stride, padding and dilation.
        residual: [B, K, H', W'] uint8, what is added before the ReLU; may be ``out``.
        relu: whether negative numbers of a float32 result become zeros; in bytes they are 0 in any case.
        out: [B, K, H', W'] channels last, where to write; may not share memory with ``x``.
        instructions: of "native", the fastest that it may use: "plain" (any processor), "pairs" (AVX2), "vnni"
            (AVX-512) or "amx"; None takes the fastest that there are.
        backend: "native" or "reference"; None takes the fastest that can run here. What is compiled or exported takes
            the reference, which torch can see into.

    Returns:
        [B, K, H', W'] channels last, uint8 (rounded to the nearest) or float32 as ``packed`` says: ``out`` where it is
        given.

    Raises:
        ValueError: a shape, dtype or layout is not as above, or the processor lacks ``instructions``.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable.
    """
    inputs = ConvInt8Inputs(x, packed, residual, relu, out, instructions)
    _check(inputs)
    if goes_through_dispatcher(x):
        return conv_int8_reference(inputs)
    return OP.choose(backend, x).run(inputs)


def to_bytes(x: Tensor, factor: float, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """x * factor, rounded to the nearest of 0 to 255; NaN to 0.

    Args:
        x: [B, C, H, W] float32.
        out: of its shape, uint8, channels last, where to write.
        backend: as of ``conv_int8``.

    Returns:
        [B, C, H, W] uint8 channels last: ``out`` where it is given.

    Raises:
        ValueError: a shape, dtype or layout is not as above, or a gradient would be needed.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.
    """
    if x.ndim != 4 or x.dtype != torch.float32:
        raise ValueError(f"x must be float32 [B, C, H, W], got {x.dtype} {list(x.shape)}")
    check_no_gradient(x=x)
    _check_map_of("out", out, list(x.shape), torch.uint8, x.device)
    if out is not None:
        check_place(out, x)
    if goes_through_dispatcher(x):
        return to_bytes_reference(x, factor, out)
    return TO_BYTES.choose(backend, x).run(x, factor, out)


def _check(inputs: ConvInt8Inputs) -> None:
    x, packed, residual, _, out, instructions = inputs
    if x.ndim != 4 or x.shape[1] != packed.shape[1] or 0 in x.shape[1:]:
        raise ValueError(f"x must be [B, {packed.shape[1]}, H, W] with pixels, got {list(x.shape)}")
    if x.dtype != torch.uint8 or x.device != packed.device:
        raise ValueError(f"x must be torch.uint8 on {packed.device}, as the weight is, got {x.dtype} on {x.device}")
    rows, columns = packed.out_size(*x.shape[2:])
    if min(rows, columns) < 1:
        raise ValueError(f"x must be at least as large as the kernel of {packed}, got {list(x.shape)}")
    shape = [len(x), packed.shape[0], rows, columns]
    _check_map_of("residual", residual, shape, torch.uint8, x.device)
    _check_map_of("out", out, shape, packed.dtype, x.device)
    if out is not None:
        check_place(out, x, residual=residual)
    if instructions is not None and instructions not in INSTRUCTIONS:
        raise ValueError(f"instructions must be None or one of {', '.join(INSTRUCTIONS)}, got {instructions!r}")
    if instructions is not None and _native.load().module is not None and not has_instructions(instructions):
        raise ValueError(f"instructions {instructions!r} are not there on this processor")


def _check_map_of(name: str, tensor: Tensor | None, shape: list[int], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is not None and (list(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device):
        got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must be {dtype} {shape} on {device}, got {got}")
