"""Convolution by csrc/cpu/conv.cpp ("gemm") and csrc/cpu/winograd.cpp ("winograd")."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.conv.types import ConvInputs, PackedConv

ALGORITHMS = ("gemm", "winograd")


def why_not(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"there is no native code for {x.device.type} devices"
    if x.dtype != torch.float32:
        return f"its native code is for float32, and the map is {x.dtype}"
    return _native.why_not(x.device)


def conv_native(inputs: ConvInputs) -> Tensor:
    packed, relu = inputs.packed, inputs.relu
    x = inputs.x.detach().contiguous(memory_format=torch.channels_last)
    sizes = sizes_of(packed, x.shape)
    out = inputs.out
    if out is None:
        batch, rows, columns, channels = sizes[0], *sizes[4:7]
        out = torch.empty(batch, channels, rows, columns, memory_format=torch.channels_last)
    residual = inputs.residual
    if residual is not None:
        residual = residual.detach().contiguous(memory_format=torch.channels_last)
    if (inputs.algorithm or fastest(packed, out)) == "winograd":
        weight, run = packed.form("winograd", _pack_for_winograd), _native.module().winograd_cpu
    else:
        weight, run = packed_for_gemm(packed), _native.module().conv_cpu
    run(
        sizes,
        x.data_ptr(),
        weight.data_ptr(),
        0 if packed.bias is None else packed.bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        relu,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def fits_winograd(packed: PackedConv) -> bool:
    """Whether it is a 3x3 convolution of stride 1 after which a map has the size that it had."""
    return packed.weight.shape[2:] == (3, 3) and packed.stride == 1 and packed.padding == packed.dilation


def fastest(packed: PackedConv, out: Tensor) -> str:
    """The algorithm for a result [B, K, H, W]."""
    # On two cores of AVX-512 gemm takes 2.1 to 2.9 times as long as winograd on layers of a ResNet-50 at 800x1066
    # (2.9 to 3.5 with AVX2), 1.7 with 8 channels and 2.7 with 16 at 100x100, and as long with 512 channels at
    # 15x20. Below that winograd reads four times the weight for little: 0.9 at 8x8, 0.4 at 4x4.
    pixels = len(out) * out.shape[2] * out.shape[3]
    pays = min(packed.weight.shape[:2]) >= 8 and pixels >= 256
    return "winograd" if pays and fits_winograd(packed) else "gemm"


def _pack_for_winograd(packed: PackedConv) -> Tensor:
    sizes = sizes_of(packed, (1, packed.weight.shape[1], 0, 0))
    form = torch.empty(_native.module().winograd_packed_floats(sizes))
    _native.module().winograd_pack(sizes, packed.weight.data_ptr(), form.data_ptr(), torch.get_num_threads())
    return form


def packed_for_gemm(packed: PackedConv) -> Tensor:
    """The weight in panels, as csrc/cpu/gemm_tile.h describes them."""
    return packed.form("gemm", _pack_for_gemm)


def _pack_for_gemm(packed: PackedConv) -> Tensor:
    sizes = sizes_of(packed, (1, packed.weight.shape[1], 0, 0))
    form = torch.empty(_native.module().conv_packed_floats(sizes))
    _native.module().conv_pack(sizes, packed.weight.data_ptr(), form.data_ptr())
    return form


def sizes_of(packed: PackedConv, shape: tuple[int, ...]) -> tuple[int, ...]:
    """In the order of struct detr_fast_conv, for a map [B, C, H, W]."""
    batch, channels, height, width = shape
    out_channels, _, kernel_height, kernel_width = packed.weight.shape
    of_map = (batch, height, width, channels, *packed.out_size(height, width), out_channels)
    return *of_map, kernel_height, kernel_width, packed.stride, packed.padding, packed.dilation
