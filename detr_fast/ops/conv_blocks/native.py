"""Residual blocks by csrc/cpu/conv_blocks.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.conv import PackedConv
from detr_fast.ops.conv.native import panels_of, why_not
from detr_fast.ops.conv_blocks.types import BlocksInputs, PackedBlock, PackedBlocks

__all__ = ["conv_blocks_native", "floats_between", "why_not"]


def conv_blocks_native(inputs: BlocksInputs) -> Tensor:
    x, blocks, out, memory = inputs
    x = x.detach().contiguous(memory_format=torch.channels_last)
    if out is None:
        out = torch.empty(blocks.shape_after(x.shape), dtype=x.dtype, memory_format=torch.channels_last)
    if memory is None:
        memory = x.new_empty(floats_between(blocks, x.shape))
    addresses = x.data_ptr(), memory.data_ptr(), out.data_ptr()
    blocks.native(_describe).run(_map_of(x.shape), *addresses, torch.get_num_threads())
    return out


def floats_between(blocks: PackedBlocks, shape: Sequence[int]) -> int:
    """Numbers that lie between the convolutions of a block at the same time, for a map of this shape."""
    count: int = blocks.native(_describe).floats(_map_of(shape))
    return count


def use_huge_pages(memory: Tensor) -> None:
    """Ask the system to map ``memory``, which nobody has written to yet, in pages of 2 MB where it can."""
    if _native.why_not(memory.device) is None:
        _native.module().use_huge_pages(memory.data_ptr(), memory.numel() * memory.element_size())


def _describe(blocks: tuple[PackedBlock, ...]) -> Any:
    return _native.module().ConvBlocks(
        [([_conv(packed) for packed in convs], shortcut and _conv(shortcut)) for convs, shortcut in blocks]
    )


def _conv(packed: PackedConv) -> tuple[tuple[int, ...], int, int]:
    """In the order of struct detr_fast_packed_conv in csrc/cpu/conv_blocks.h."""
    out_channels, channels, *kernel = packed.shape
    numbers = channels, out_channels, *kernel, packed.stride, packed.padding, packed.dilation
    return numbers, panels_of(packed).data_ptr(), 0 if packed.bias is None else packed.bias.data_ptr()


def _map_of(shape: Sequence[int]) -> tuple[int, int, int]:
    return shape[0], shape[2], shape[3]
