"""The highest of upsampled masks by csrc/cpu/mask_argmax.cpp."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.mask_argmax.types import Places


def why_not(masks: Tensor) -> str | None:
    if masks.device.type != "cpu":
        return f"there is no native code for {masks.device.type} devices"
    if masks.dtype == torch.float64:
        return "the native code computes in float32, and the masks are float64"
    return _native.why_not(masks.device)


def mask_argmax_native(masks: Tensor, rows: Places, columns: Places) -> Tensor:
    x = masks.detach().float().contiguous()
    firsts = [np.ascontiguousarray(places.first, np.int32) for places in (rows, columns)]
    shares = [np.ascontiguousarray(places.share, np.float32) for places in (rows, columns)]
    index = torch.empty(len(rows.first), len(columns.first), dtype=torch.int64)
    _native.module().mask_argmax_cpu(
        x.data_ptr(),
        x.shape,
        *((len(a), a.ctypes.data, b.ctypes.data) for a, b in zip(firsts, shares, strict=True)),
        index.data_ptr(),
        torch.get_num_threads(),
    )
    return index
