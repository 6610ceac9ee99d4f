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
    places = [places_of(along) for along in (rows, columns)]
    index = torch.empty(len(rows.first), len(columns.first), dtype=torch.int64)
    _native.module().mask_argmax_cpu(
        x.data_ptr(),
        x.shape,
        *((len(first), first.ctypes.data, share.ctypes.data) for first, share in places),
        index.data_ptr(),
        torch.get_num_threads(),
    )
    return index


def places_of(along: Places) -> tuple[np.ndarray, np.ndarray]:
    """``first`` and ``share`` as the C++ reads them."""
    return np.ascontiguousarray(along.first, np.int32), np.ascontiguousarray(along.share, np.float32)
