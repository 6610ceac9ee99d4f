"""Upsampled masks in Triton, made pixel by pixel and never stored: the highest, and where they are above a bound.

Its speed has not been measured: it was written and checked on machines without a GPU.
"""

# Triton takes annotations of a kernel for the types to compile it for, so that most arguments have none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast.ops._triton import on_device
from detr_fast.ops.mask_argmax.types import Places

# 64 neighbours of a row are a quarter of as many logits apart, and written in one or two lines of the cache.
BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 8, 64, 4
SIZES = ["masks", "height", "width", "rows", "columns"]


@triton.jit
def places_of(first, share, count, block, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """Numbers of a block's rows (or columns), the logits before them, and the share of those after them."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    return (
        at,
        tl.load(first + at, mask=at < count, other=0),
        tl.load(share + at, mask=at < count, other=0.0).to(COMPUTE),
    )


@triton.jit
def interpolated(mask, width, above, below, left, right, down, along, COMPUTE: tl.constexpr):
    """A tile of pixels between the logits of rows ``above`` and ``below`` and columns ``left`` and ``right``."""
    first, second = mask + above[:, None] * width, mask + below[:, None] * width
    left, right, down, along = left[None, :], right[None, :], down[:, None], along[None, :]
    on_left = tl.load(first + left).to(COMPUTE) * (1 - down) + tl.load(second + left).to(COMPUTE) * down
    on_right = tl.load(first + right).to(COMPUTE) * (1 - down) + tl.load(second + right).to(COMPUTE) * down
    return on_left * (1 - along) + on_right * along


@triton.jit(do_not_specialize=SIZES)
def mask_argmax_kernel(
    logits,  # [K, h, w]
    first_row,
    row_share,
    first_column,
    column_share,
    index,  # [rows, columns]
    masks: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    y, above, down = places_of(first_row, row_share, rows, tl.program_id(0), BLOCK_R, COMPUTE)
    x, left, along = places_of(first_column, column_share, columns, tl.program_id(1), BLOCK_C, COMPUTE)
    below, right = tl.minimum(above + 1, height - 1), tl.minimum(left + 1, width - 1)
    best = tl.full([BLOCK_R, BLOCK_C], float("-inf"), COMPUTE)
    best_mask = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for k in range(masks):
        mask = logits + tl.cast(k, tl.int64) * height * width
        value = interpolated(mask, width, above, below, left, right, down, along, COMPUTE)
        best_mask = tl.where(value > best, k, best_mask)
        best = tl.where(value > best, value, best)
    inside = (y < rows)[:, None] & (x < columns)[None, :]
    place = y.to(tl.int64)[:, None] * columns + x[None, :]
    tl.store(index + place, best_mask.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "bound"])
def mask_threshold_kernel(
    logits,  # [K, h, w]
    first_row,
    row_share,
    first_column,
    column_share,
    result,  # [K, rows, columns]
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    bound: tl.float32,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Masks are the first dimension of the grid, which alone may be large."""
    y, above, down = places_of(first_row, row_share, rows, tl.program_id(1), BLOCK_R, COMPUTE)
    x, left, along = places_of(first_column, column_share, columns, tl.program_id(2), BLOCK_C, COMPUTE)
    below, right = tl.minimum(above + 1, height - 1), tl.minimum(left + 1, width - 1)
    k = tl.program_id(0).to(tl.int64)
    value = interpolated(logits + k * height * width, width, above, below, left, right, down, along, COMPUTE)
    inside = (y < rows)[:, None] & (x < columns)[None, :]
    place = (k * rows + y)[:, None] * columns + x[None, :]
    tl.store(result + place, (value > bound).to(tl.uint8), mask=inside)


def mask_argmax_triton(masks: Tensor, rows: Places, columns: Places) -> Tensor:
    """As ``mask_argmax``. One launch; any sizes are taken by the same machine code."""
    index = masks.new_empty(len(rows.first), len(columns.first), dtype=torch.int64)
    if index.numel() > 0:
        tensors = (masks.detach().contiguous(), *rows.on(masks.device), *columns.on(masks.device), index)
        with on_device(masks.device):
            mask_argmax_kernel[_grid(index)](*tensors, *masks.shape, *index.shape, **_constants(masks))
    return index


def mask_threshold_triton(masks: Tensor, rows: Places, columns: Places, bound: float) -> Tensor:
    """As ``mask_threshold``. One launch; any sizes are taken by the same machine code."""
    above = masks.new_empty(len(masks), len(rows.first), len(columns.first), dtype=torch.uint8)
    if above.numel() > 0:
        tensors = (masks.detach().contiguous(), *rows.on(masks.device), *columns.on(masks.device), above)
        with on_device(masks.device):
            mask_threshold_kernel[(len(masks), *_grid(above))](
                *tensors, *masks.shape[1:], *above.shape[1:], bound, **_constants(masks)
            )
    return above


def _grid(result: Tensor) -> tuple[int, int]:
    return triton.cdiv(result.shape[-2], BLOCK_ROWS), triton.cdiv(result.shape[-1], BLOCK_COLUMNS)


def _constants(masks: Tensor) -> dict[str, Any]:
    compute = tl.float64 if masks.dtype == torch.float64 else tl.float32
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    return {"COMPUTE": compute, "BLOCK_R": BLOCK_ROWS, "BLOCK_C": BLOCK_COLUMNS, **options}
