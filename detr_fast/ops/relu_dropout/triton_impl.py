"""The op in Triton: a kernel forward, a kernel backward.

Its speed has not been measured: it was written and checked on machines without a GPU.
"""

# Triton takes annotations of a kernel for the types to compile it for, so that most arguments have none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast.ops._triton import on_device
from detr_fast.ops.dropout import Dropout
from detr_fast.ops.dropout_triton import drop, keep_tile

# Eight numbers of a row for each of 128 threads, one load of 16 bytes in 16 bits; eight rows share nothing, so that a
# tile is no taller than that.
BLOCK_N, BLOCK_D, WARPS = 4, 256, 4


@triton.jit
def tile_of(columns, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows, columns and first column of a program; programs of one row of tiles follow each other."""
    across = tl.cdiv(columns, BLOCK_D)
    r = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) % across * BLOCK_D
    return r, first + tl.arange(0, BLOCK_D), first


@triton.jit(do_not_specialize=["rows"])
def relu_dropout_fwd_kernel(
    x,  # [N, D]
    seed,  # [1]
    y,  # [N, D]
    rows: tl.int32,
    columns,
    x_stride,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r, c, first = tile_of(columns, BLOCK_N, BLOCK_D)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    row = r.to(tl.int64)[:, None]
    values = tl.load(x + row * x_stride + c[None, :], mask=inside, other=0.0).to(COMPUTE)
    values = tl.where(values < 0, 0.0, values)  # NaN stays NaN
    kept = drop(values, keep_tile(seed, r, first, BLOCK_D, THRESHOLD), SCALE)
    tl.store(y + row * columns + c[None, :], kept, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def relu_dropout_bwd_kernel(
    grad_y,  # [N, D]
    y,  # [N, D]
    grad_x,  # [N, D]
    rows: tl.int32,
    columns,
    grad_y_stride,
    SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r, c, _ = tile_of(columns, BLOCK_N, BLOCK_D)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    row = r.to(tl.int64)[:, None]
    output = tl.load(y + row * columns + c[None, :], mask=inside, other=0.0)
    grad = tl.load(grad_y + row * grad_y_stride + c[None, :], mask=inside, other=0.0).to(COMPUTE)
    tl.store(grad_x + row * columns + c[None, :], tl.where(output > 0, grad * SCALE, 0.0), mask=inside)


def relu_dropout_triton(x: Tensor, dropout: Dropout, overwrite: bool = False) -> Tensor:
    """As ``relu_dropout``. One launch; any number of rows is taken by the same machine code."""
    y = x if overwrite else x.new_empty(x.shape)
    rows, columns = x.shape
    if y.numel() > 0:
        constants = {"THRESHOLD": dropout.threshold, "SCALE": dropout.scale, **_constants(x)}
        with on_device(x.device):
            relu_dropout_fwd_kernel[_grid(x)](x, dropout.seed, y, rows, columns, x.stride(0), **constants)
    return y


def relu_dropout_triton_backward(grad_y: Tensor, y: Tensor, scale: float) -> Tensor:
    y, grad_x = y.contiguous(), y.new_empty(y.shape)
    rows, columns = y.shape
    if y.numel() > 0:
        with on_device(y.device):
            relu_dropout_bwd_kernel[_grid(y)](
                grad_y, y, grad_x, rows, columns, grad_y.stride(0), SCALE=scale, **_constants(y)
            )
    return grad_x


def _constants(x: Tensor) -> dict[str, object]:
    compute = tl.float64 if x.dtype == torch.float64 else tl.float32
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    return {"COMPUTE": compute, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, **options}


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.shape[0], BLOCK_N) * triton.cdiv(x.shape[1], BLOCK_D),)
