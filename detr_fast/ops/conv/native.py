"""Convolution by csrc/cpu/conv.cpp ("gemm") and csrc/cpu/winograd.cpp ("winograd")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.conv.types import ConvInputs, Convolution, PackedConv, out_size

ALGORITHMS = ("gemm", "winograd")


def why_not(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"there is no native code for {x.device.type} devices"
    if x.dtype != torch.float32:
        return f"its native code is for float32, and the map is {x.dtype}"
    return _native.why_not(x.device)


class Sizes(NamedTuple):
    """In the order of struct detr_fast_conv in csrc/cpu/conv.h."""

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    out_channels: int
    kernel_height: int
    kernel_width: int
    stride: int
    padding: int
    dilation: int


def conv_native(inputs: ConvInputs) -> Tensor:
    packed = inputs.packed
    x = inputs.x.detach().contiguous(memory_format=torch.channels_last)
    sizes = sizes_of(packed, x.shape)
    algorithm = inputs.algorithm or fastest(sizes)
    maps = _channels_last(inputs.residual), _channels_last(inputs.gate)
    return run(algorithm, sizes, x, panels_of(packed), packed.bias, *maps, inputs.relu, inputs.out)


def run(
    algorithm: str,
    sizes: Sizes,
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """A convolution of channels-last maps with a weight in the panels that ``pack`` makes."""
    if out is None:
        shape = sizes.batch, sizes.out_channels, sizes.out_height, sizes.out_width
        out = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    native = _native.module()
    (native.winograd_cpu if algorithm == "winograd" else native.conv_cpu)(
        sizes,
        x.data_ptr(),
        panels.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        relu,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _channels_last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous(memory_format=torch.channels_last)


def fits_winograd(sizes: Sizes) -> bool:
    """Whether it is a 3x3 convolution of stride 1 after which a map has the size that it had."""
    return (sizes.kernel_height, sizes.kernel_width, sizes.stride) == (3, 3, 1) and sizes.padding == sizes.dilation


def fastest(sizes: Sizes) -> str:
    """The algorithm for a convolution of these sizes."""
    return "winograd" if _native.module().winograd_is_faster(sizes) else "gemm"


def winograd_weight_gradient(sizes: Sizes, x: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    """Of the weight [K, C, 3, 3], times a factor for each channel [K], from channels-last maps."""
    of_weight = torch.empty(sizes.out_channels, sizes.channels, 3, 3, dtype=torch.float32)
    addresses = (tensor.data_ptr() for tensor in (x, grad, scale, of_weight))
    _native.module().winograd_weight_gradient_cpu(sizes, *addresses, torch.get_num_threads())
    return of_weight


def pack(sizes: Sizes, weight: Tensor, scale: Tensor | None = None, *, adjoint: bool = False) -> Tensor:
    """The weight in panels, as csrc/cpu/gemm_tile.h describes them: what both algorithms read.

    Args:
        weight: [K, C, R, S] contiguous; with ``adjoint`` that of the convolution whose gradient this one takes back.
        scale: [K], a factor for each channel of ``weight``.
    """
    native = _native.module()
    panels = torch.empty(native.conv_packed_floats(sizes), dtype=torch.float32)
    of_scale = 0 if scale is None else scale.data_ptr()
    native.conv_pack(sizes, weight.data_ptr(), of_scale, adjoint, panels.data_ptr(), torch.get_num_threads())
    return panels


def panels_of(packed: PackedConv, scale: Tensor | None = None) -> Tensor:
    """The weight in panels, in which ``packed`` keeps it from then on, the first time multiplied by ``scale`` [K]."""
    return packed.panels(lambda packed, weight: pack(sizes_of(packed, (1, weight.shape[1], 0, 0)), weight, scale))


def sizes_of(packed: Convolution, shape: Sequence[int]) -> Sizes:
    """Of the convolution of a map [B, C, H, W]."""
    batch, channels, height, width = shape
    out_channels, _, kernel_height, kernel_width = packed.shape
    rows, columns = out_size(packed, height, width)
    of_maps = (batch, height, width, channels, rows, columns, out_channels)
    return Sizes(*of_maps, kernel_height, kernel_width, packed.stride, packed.padding, packed.dilation)
