"""The stem of a ResNet by csrc/cpu/conv_max_pool.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.conv import PackedConv
from detr_fast.ops.conv.native import panels_of, sizes_of, why_not

__all__ = ["conv_max_pool_native", "why_not"]


def conv_max_pool_native(x: Tensor, packed: PackedConv, out: Tensor | None) -> Tensor:
    sizes = sizes_of(packed, x.shape)
    if out is None:
        rows, columns = ((length + 1) // 2 for length in sizes[4:6])
        out = torch.empty(len(x), packed.shape[0], rows, columns, memory_format=torch.channels_last)
    _native.module().conv_max_pool_cpu(
        sizes,
        x.data_ptr(),
        x.stride(),
        panels_of(packed).data_ptr(),
        0 if packed.bias is None else packed.bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
