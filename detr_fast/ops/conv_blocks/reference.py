"""Residual blocks in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.conv import PackedConv
from detr_fast.ops.conv_blocks.types import BlocksInputs, PackedBlock


def conv_blocks_reference(inputs: BlocksInputs) -> Tensor:
    x = inputs.x
    for block in inputs.blocks.blocks:
        x = _block(x, block)
    return x if inputs.out is None else inputs.out.copy_(x)


def _block(x: Tensor, block: PackedBlock) -> Tensor:
    y = x
    for packed in block.convs[:-1]:
        y = F.relu(_conv(y, packed))
    y = _conv(y, block.convs[-1]) + (x if block.shortcut is None else _conv(x, block.shortcut))
    return F.relu(y)


def _conv(x: Tensor, packed: PackedConv) -> Tensor:
    return F.conv2d(x, packed.weight, packed.bias, packed.stride, packed.padding, packed.dilation)
