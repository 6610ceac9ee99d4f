"""Where upsampled masks are above a bound, by csrc/cpu/mask_threshold.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.mask_argmax.native import places_of
from detr_fast.ops.mask_argmax.types import Places


def mask_threshold_native(masks: Tensor, rows: Places, columns: Places, bound: float) -> Tensor:
    x = masks.detach().float().contiguous()
    above = torch.empty(len(x), len(rows.first), len(columns.first), dtype=torch.uint8)
    places = [places_of(along) for along in (rows, columns)]
    _native.module().mask_threshold_cpu(
        x.data_ptr(),
        x.shape,
        *((len(first), first.ctypes.data, share.ctypes.data) for first, share in places),
        bound,
        above.data_ptr(),
        torch.get_num_threads(),
    )
    return above
