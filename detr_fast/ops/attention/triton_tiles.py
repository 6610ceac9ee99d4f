"""What the attention kernels share: which work a program takes, and tiles of tokens read and written."""

# Triton takes annotations of a kernel for the types to compile it for.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# Images whose offsets are read in one step; more of them take several.
IMAGES_PER_STEP = tl.constexpr(32)


@triton.jit
def find_work(offsets, images, program, BLOCK: tl.constexpr):
    """The image and the block of its tokens that a program takes: every image has as many programs as it has blocks.

    So the host knows the grid from the lengths, no program is without tokens, and no list of work is copied.
    """
    image = 0
    first_program = 0  # of the images before the one sought
    programs = 0  # of the images looked at
    for start in range(0, images, IMAGES_PER_STEP):
        i = start + tl.arange(0, IMAGES_PER_STEP)
        lengths = tl.load(offsets + i + 1, mask=i < images, other=0) - tl.load(offsets + i, mask=i < images, other=0)
        blocks = (lengths + BLOCK - 1) // BLOCK
        before = (programs + tl.cumsum(blocks, 0) <= program) & (i < images)
        image += tl.sum(before.to(tl.int32), 0)
        first_program += tl.sum(tl.where(before, blocks, 0), 0)
        programs += tl.sum(blocks, 0)
    return image, program - first_program


@triton.jit
def span(offsets, image):
    """An image's first token among all, and how many it has."""
    first = tl.load(offsets + image)
    return first, tl.load(offsets + image + 1) - first


@triton.jit
def head_of(tokens, first, head, stride_token, stride_head, UNIT: tl.constexpr):
    """Where a head of an image's first token lies. Strides are in units, so that addresses are known to be aligned."""
    return tokens + first.to(tl.int64) * (stride_token * UNIT) + head.to(tl.int64) * (stride_head * UNIT)


@triton.jit
def load_tile(head, rows, length, stride_token, SIZE: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr):
    """Rows of a head [rows, BLOCK_E]; zeros beyond the length (None: there is nothing beyond) and the head's size."""
    e = tl.arange(0, BLOCK_E)
    places = head + rows[:, None] * (stride_token * UNIT) + e[None, :]
    if length is None and SIZE == BLOCK_E:
        tile = tl.load(places)
    elif length is None:
        tile = tl.load(places, mask=e[None, :] < SIZE, other=0.0)
    elif SIZE == BLOCK_E:
        tile = tl.load(places, mask=rows[:, None] < length, other=0.0)
    else:
        tile = tl.load(places, mask=(rows[:, None] < length) & (e[None, :] < SIZE), other=0.0)
    return tile


@triton.jit
def store_tile(head, rows, length, stride_token, x, SIZE: tl.constexpr, BLOCK_E: tl.constexpr, UNIT: tl.constexpr):
    """The inverse of ``load_tile``."""
    e = tl.arange(0, BLOCK_E)
    places = head + rows[:, None] * (stride_token * UNIT) + e[None, :]
    inside = (rows[:, None] < length) & (e[None, :] < SIZE)
    tl.store(places, x.to(head.dtype.element_ty), mask=inside)


@triton.jit
def product(
    a,
    a_head,
    a_rows,
    a_length,
    a_token,
    b,
    b_head,
    b_rows,
    b_length,
    b_token,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile a [a_rows, BLOCK_E] times tile b [b_rows, BLOCK_E] transposed.

    CHUNK: not from the tiles but from memory, so many elements of a head at a time. A product of float32 takes its
    operands from registers, where whole tiles, two parts of each number, do not fit.
    """
    if CHUNK == 0:
        c = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        c = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
        for first in range(0, BLOCK_E, CHUNK):
            x = load_chunk(a_head, a_rows, a_length, a_token, first, SIZE, UNIT, CHUNK)
            y = load_chunk(b_head, b_rows, b_length, b_token, first, SIZE, UNIT, CHUNK)
            c = tl.dot(x, tl.trans(y), c, input_precision=PRECISION)
    return c


@triton.jit
def load_chunk(head, rows, length, stride_token, first, SIZE: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr):
    """Of rows of a head, the CHUNK elements from ``first``."""
    e = first + tl.arange(0, CHUNK)
    inside = (rows[:, None] >= 0) & (e[None, :] < SIZE)
    if length is not None:
        inside = inside & (rows[:, None] < length)
    return tl.load(head + rows[:, None] * (stride_token * UNIT) + e[None, :], mask=inside, other=0.0)
