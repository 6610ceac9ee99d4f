"""Convolution, bias, residual and ReLU in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.conv.types import ConvInputs


def conv_reference(inputs: ConvInputs) -> Tensor:
    x, packed, residual, relu, out, _, gate = inputs
    y = F.conv2d(x, packed.weight, packed.bias, packed.stride, packed.padding, packed.dilation)
    if residual is not None:
        y = y + residual
    if relu:
        y = F.relu(y)
    if gate is not None:
        y = torch.where(gate <= 0, 0.0, y)
    return y.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(y)
