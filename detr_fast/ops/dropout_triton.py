"""Elementwise dropout inside a Triton kernel: the mask of ``dropout.keep_mask``, a tile of it."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl

from detr_fast.ops.dropout import ROUNDS

PHILOX_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def keep_tile(seed, rows, first_column, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr):
    """What dropout keeps of BLOCK_D columns of rows: [rows, BLOCK_D] bool. ``first_column`` is a multiple of 32."""
    ROWS: tl.constexpr = rows.shape[0]
    key = tl.load(seed).to(tl.uint64, bitcast=True)
    call = (first_column // 8 + tl.arange(0, BLOCK_D // 8)).to(tl.uint32)[None, :]
    row = rows.to(tl.uint32)[:, None]
    none = row * 0 + call * 0
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(none + call, none + row, none, none, low, high, PHILOX_ROUNDS)
    # Joined so that the words of a call are w0, w1, w2, w3 in the last dimensions; then a word of four calls is eight
    # columns, of which a call has the low and the high half.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, BLOCK_D // 32, 4, 4)
    words = tl.permute(words, (0, 1, 3, 2))
    numbers = tl.join(words & 0xFFFF, words >> 16).reshape(ROWS, BLOCK_D)
    return numbers >= THRESHOLD


@triton.jit
def drop(values, keep, SCALE: tl.constexpr):
    """Dropout of a tile; ``keep`` is None where there is none."""
    if keep is None:
        return values
    else:
        return tl.where(keep, values * SCALE, 0.0)
