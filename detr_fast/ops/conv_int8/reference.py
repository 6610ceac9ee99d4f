"""Convolution of bytes in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.conv_int8.types import ConvInt8Inputs


def conv_int8_reference(inputs: ConvInt8Inputs) -> Tensor:
    x, packed, residual, relu, out, _ = inputs
    # float64 holds sums of 8-bit products exactly; few libraries convolve integers.
    sums = F.conv2d(x.double(), packed.weight.double(), None, packed.stride, packed.padding, packed.dilation)
    factor, bias = (v[: packed.shape[0], None, None] for v in (packed.factor, packed.bias))
    y = sums * factor + bias
    if residual is not None:
        y = y + packed.residual_factor * residual
    if relu:
        y = F.relu(y)
    y = y.float() if packed.is_float else y.round().clamp(0, 255).to(torch.uint8)
    return y.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(y)


def to_bytes_reference(x: Tensor, factor: float, out: Tensor | None) -> Tensor:
    y = torch.nan_to_num(x * factor, nan=0.0).round().clamp(0, 255).to(torch.uint8)
    return y.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(y)
