"""Convolution of bytes by csrc/cpu/conv_int8.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.conv.native import sizes_of
from detr_fast.ops.conv_int8.types import ConvInt8Inputs

# In the order of enum Int8Instructions in csrc/cpu/int8_tile.h.
INSTRUCTIONS = ("plain", "pairs", "vnni", "amx")


def why_not(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"there is no native code for {x.device.type} devices"
    return _native.why_not(x.device)


def has_instructions(name: str) -> bool:
    """Whether this processor has them."""
    return INSTRUCTIONS.index(name) <= _native.module().int8_instructions()


def conv_int8_native(inputs: ConvInt8Inputs) -> Tensor:
    packed, sizes = inputs.packed, sizes_of(inputs.packed, inputs.x.shape)
    x = inputs.x.contiguous(memory_format=torch.channels_last)
    residual = None if inputs.residual is None else inputs.residual.contiguous(memory_format=torch.channels_last)
    out = inputs.out
    if out is None:
        shape = sizes.batch, sizes.out_channels, sizes.out_height, sizes.out_width
        out = torch.empty(shape, dtype=packed.dtype, memory_format=torch.channels_last)
    _native.module().conv_int8_cpu(
        sizes,
        x.data_ptr(),
        packed.panels.data_ptr(),
        packed.factor.data_ptr(),
        packed.bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        packed.residual_factor,
        packed.is_float,
        inputs.relu,
        out.data_ptr(),
        INSTRUCTIONS.index(inputs.instructions or INSTRUCTIONS[-1]),
        torch.get_num_threads(),
    )
    return out


def to_bytes_native(x: Tensor, factor: float, out: Tensor | None) -> Tensor:
    x = x.detach().contiguous(memory_format=torch.channels_last)
    if out is None:
        out = torch.empty_like(x, dtype=torch.uint8, memory_format=torch.channels_last)
    _native.module().to_bytes_cpu(x.data_ptr(), x.numel(), factor, out.data_ptr(), torch.get_num_threads())
    return out
