"""The stem of a ResNet in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.conv import PackedConv


def conv_max_pool_reference(x: Tensor, packed: PackedConv, out: Tensor | None) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    y = F.relu(F.conv2d(x, packed.weight, packed.bias, packed.stride, packed.padding, packed.dilation))
    y = F.max_pool2d(y, 3, stride=2, padding=1)
    return y.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(y)
