"""The op in Triton: one kernel forward, one backward.

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
from detr_fast.ops.add_layer_norm.types import Gradients, Inputs, Normalized
from detr_fast.ops.dropout_triton import drop, keep_tile

# A row lies in the registers of a program: memory is read once. A thread holds ELEMENTS_PER_THREAD numbers of each
# array, so that two loads of 16 bytes are under way in float32 and one in 16 bits.
ELEMENTS_PER_THREAD = 8
THREADS_PER_WARP = 32
# Four warps are several rows of DETR's 256 numbers; a row of 2048 takes eight.
FEWEST_WARPS, MOST_WARPS = 4, 8

# A backward program sums the gradients of weight and bias over its rows in registers, and writes one row of sums, which
# are summed in the order of the programs. So many programs are two for each multiprocessor of an H100, and write a
# fortieth of what a batch of 8 images reads.
BACKWARD_PROGRAMS = 264

# Narrower rows than DETR's leave lanes idle: nobody's model is that narrow.
FEWEST_COLUMNS = 256


@triton.jit
def load_tile(matrix, stride, r, c, inside):
    return tl.load(matrix + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows", "pos_rows"])
def add_layer_norm_fwd_kernel(
    x,  # [N, D]
    residual,  # [N, D]
    weight,  # [D]
    bias,  # [D]
    pos,  # [P, D], or None
    seed,  # [1], or None
    y,  # [N, D]
    y_pos,  # [N, D], or None
    mean,  # [N]
    rstd,  # [N]
    rows: tl.int32,
    pos_rows: tl.int32,
    columns,
    x_stride,
    residual_stride,
    pos_stride,
    EPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program BLOCK_N rows."""
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_D)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    keep = None if seed is None else keep_tile(seed, r, 0, BLOCK_D, THRESHOLD)
    total = drop(load_tile(x, x_stride, r, c, inside).to(COMPUTE), keep, SCALE)
    total += load_tile(residual, residual_stride, r, c, inside).to(COMPUTE)

    row_mean = tl.sum(total, 1) / columns
    centred = tl.where(inside, total - row_mean[:, None], 0.0)
    row_rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / columns + EPS)
    tl.store(mean + r, row_mean, mask=r < rows)
    tl.store(rstd + r, row_rstd, mask=r < rows)

    w = tl.load(weight + c, mask=c < columns, other=0.0).to(COMPUTE)
    b = tl.load(bias + c, mask=c < columns, other=0.0).to(COMPUTE)
    result = centred * row_rstd[:, None] * w[None, :] + b[None, :]
    place = r.to(tl.int64)[:, None] * columns + c[None, :]
    tl.store(y + place, result, mask=inside)
    if pos is not None:
        tl.store(y_pos + place, result + load_tile(pos, pos_stride, r % pos_rows, c, inside), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def add_layer_norm_bwd_kernel(
    grad_y,  # [N, D], or None
    grad_y_pos,  # [N, D], or None
    x,  # [N, D]
    residual,  # [N, D]
    weight,  # [D]
    mean,  # [N]
    rstd,  # [N]
    seed,  # [1], or None
    grad_x,  # [N, D], or None: the same as grad_residual
    grad_residual,  # [N, D]
    sums,  # [programs, 2, D]: of the gradients of weight and bias
    rows: tl.int32,
    rows_each: tl.int32,
    columns,
    grad_y_stride,
    grad_y_pos_stride,
    x_stride,
    residual_stride,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program ``rows_each`` rows, one after the other BLOCK_N of them."""
    first = tl.program_id(0) * rows_each
    end = tl.minimum(first + rows_each, rows)
    c = tl.arange(0, BLOCK_D)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(COMPUTE)
    weight_sum = tl.zeros([BLOCK_N, BLOCK_D], COMPUTE)
    bias_sum = tl.zeros([BLOCK_N, BLOCK_D], COMPUTE)
    for start in range(first, end, BLOCK_N):
        r = start + tl.arange(0, BLOCK_N)
        inside = (r < end)[:, None] & (c < columns)[None, :]
        keep = None if seed is None else keep_tile(seed, r, 0, BLOCK_D, THRESHOLD)
        total = drop(load_tile(x, x_stride, r, c, inside).to(COMPUTE), keep, SCALE)
        total += load_tile(residual, residual_stride, r, c, inside).to(COMPUTE)
        row_mean = tl.load(mean + r, mask=r < end, other=0.0)
        row_rstd = tl.load(rstd + r, mask=r < end, other=0.0)
        normal = tl.where(inside, (total - row_mean[:, None]) * row_rstd[:, None], 0.0)

        grad = tl.zeros([BLOCK_N, BLOCK_D], COMPUTE)
        if grad_y is not None:
            grad += load_tile(grad_y, grad_y_stride, r, c, inside).to(COMPUTE)
        if grad_y_pos is not None:
            grad += load_tile(grad_y_pos, grad_y_pos_stride, r, c, inside).to(COMPUTE)
        weight_sum += grad * normal
        bias_sum += grad

        inner = grad * w[None, :]
        along_ones = tl.sum(inner, 1) / columns
        along_normal = tl.sum(inner * normal, 1) / columns
        result = (inner - along_ones[:, None] - normal * along_normal[:, None]) * row_rstd[:, None]
        place = r.to(tl.int64)[:, None] * columns + c[None, :]
        tl.store(grad_residual + place, result, mask=inside)
        if grad_x is not None:
            tl.store(grad_x + place, drop(result, keep, SCALE), mask=inside)
    place = tl.program_id(0) * 2 * columns + c
    tl.store(sums + place, tl.sum(weight_sum, 0), mask=c < columns)
    tl.store(sums + place + columns, tl.sum(bias_sum, 0), mask=c < columns)


def add_layer_norm_triton(inputs: Inputs, bias: Tensor, pos: Tensor | None, eps: float) -> Normalized:
    """As ``add_layer_norm``. One launch; any number of rows is taken by the same machine code."""
    x, residual, weight, dropout = _readable(inputs)
    rows, columns = x.shape
    y = x.new_empty(x.shape, dtype=inputs.dtype)
    y_pos = None if pos is None else torch.empty_like(y)
    mean, rstd = (x.new_empty(rows, dtype=inputs.compute_dtype) for _ in range(2))
    if rows == 0:
        return Normalized(y, y_pos, mean, rstd)
    pos = None if pos is None else _contiguous_columns(pos)
    constants = constants_of(inputs)
    tensors = (x, residual, weight, bias.contiguous(), pos, dropout and dropout.seed, y, y_pos, mean, rstd)
    strides = (x.stride(0), residual.stride(0), 0 if pos is None else pos.stride(0))
    with on_device(x.device):
        add_layer_norm_fwd_kernel[(triton.cdiv(rows, constants["BLOCK_N"]),)](
            *tensors, rows, 1 if pos is None else len(pos), columns, *strides, EPS=eps, **constants
        )
    return Normalized(y, y_pos, mean, rstd)


def add_layer_norm_triton_backward(
    inputs: Inputs, mean: Tensor, rstd: Tensor, grad_y: Tensor | None, grad_y_pos: Tensor | None
) -> Gradients:
    """Two launches: the kernel, and the sum of what its programs summed."""
    x, residual, weight, dropout = _readable(inputs)
    rows, columns = x.shape
    grad_x = None if inputs.one_gradient else x.new_empty(x.shape)
    grad_residual = residual.new_empty(x.shape)
    if rows == 0:
        return Gradients(grad_x, grad_residual, torch.zeros_like(weight), torch.zeros_like(weight))
    constants = constants_of(inputs)
    tiles = triton.cdiv(rows, constants["BLOCK_N"])
    tiles_each = triton.cdiv(tiles, BACKWARD_PROGRAMS)
    programs = triton.cdiv(tiles, tiles_each)
    sums = x.new_empty((programs, 2, columns), dtype=inputs.compute_dtype)
    grads = [None if g is None else _contiguous_columns(g) for g in (grad_y, grad_y_pos)]
    tensors = (*grads, x, residual, weight, mean, rstd, dropout and dropout.seed, grad_x, grad_residual, sums)
    strides = (*(0 if g is None else g.stride(0) for g in grads), x.stride(0), residual.stride(0))
    with on_device(x.device):
        add_layer_norm_bwd_kernel[(programs,)](
            *tensors, rows, tiles_each * constants["BLOCK_N"], columns, *strides, **constants
        )
    grad_weight, grad_bias = sums.sum(0).to(weight.dtype).unbind()
    return Gradients(grad_x, grad_residual, grad_weight, grad_bias)


def constants_of(inputs: Inputs) -> dict[str, Any]:
    """What both kernels are compiled for: the width of a model and its dropout, and no number of rows."""
    block = max(FEWEST_COLUMNS, triton.next_power_of_2(inputs.x.shape[1]))
    threads = block // ELEMENTS_PER_THREAD
    warps = min(MOST_WARPS, max(FEWEST_WARPS, threads // THREADS_PER_WARP))
    dropout = inputs.dropout
    return {
        "THRESHOLD": 0 if dropout is None else dropout.threshold,
        "SCALE": 1.0 if dropout is None else dropout.scale,
        "COMPUTE": tl.float64 if inputs.compute_dtype == torch.float64 else tl.float32,
        "BLOCK_N": warps * THREADS_PER_WARP // threads,
        "BLOCK_D": block,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def _readable(inputs: Inputs) -> Inputs:
    x, residual, weight = (t.detach() for t in inputs[:3])
    return Inputs(_contiguous_columns(x), _contiguous_columns(residual), weight.contiguous(), inputs.dropout)


def _contiguous_columns(matrix: Tensor) -> Tensor:
    return matrix.detach() if matrix.stride(1) == 1 else matrix.detach().contiguous()
