"""Where upsampled masks are above a bound, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops.mask_argmax.types import Places

# Upsampled masks in memory at a time.
CHUNK = 16


def mask_threshold_reference(masks: Tensor, rows: Places, columns: Places, bound: float) -> Tensor:
    masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
    above = [columns.interpolate(rows.interpolate(part, 1), 2) > bound for part in masks.split(CHUNK)]
    return torch.cat(above).to(torch.uint8)
