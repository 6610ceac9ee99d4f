"""The losses of masks in Triton: a kernel for gradients and sums of tiles of logits, and one that finishes both.

A logit's gradient is gathered from the pixels that it takes part in, so that nothing is added by several programs and
every bit comes again. A pixel is computed for each of the four logits around it: its sigmoid is cheaper than to store
and read its three gradients.

Its speed has not been measured: it was written and checked on machines without a GPU.
"""

# Triton takes annotations of a kernel for the types to compile it for, so that most arguments have none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast.ops._triton import on_device
from detr_fast.ops.mask_loss.reference import ALPHA, frame_of

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 4, 64, 4
# Of a tile: focal loss, probabilities, those inside the target, pixels inside the target.
SUMS = tl.constexpr(4)
BLOCK_TILES = 256
BLOCK_FINISH = 1024
FOREGROUND = tl.constexpr(ALPHA)

SIZES = ["first_mask", "height", "width", "frame_height", "frame_width", "target_height", "target_width"]


@triton.jit
def start_of(k, size, frame):
    """The first of ``frame`` places that lies at or behind the ``k``-th of ``size``; the last one has all the rest."""
    place = ((2 * k + 1).to(tl.int64) * frame - size + 2 * size - 1) // (2 * size)
    return tl.where(k <= 0, 0, tl.where(k >= size, frame, place)).to(tl.int32)


@triton.jit
def source_of(place, size, frame, COMPUTE: tl.constexpr):
    """The logit before a place of the frame, the one after it, and its share, in whole numbers up to the last step."""
    position = tl.maximum((2 * place + 1).to(tl.int64) * size - frame, 0)
    first = tl.minimum(position // (2 * frame), size - 1)
    rest = tl.where(first == size - 1, 0, position - first * 2 * frame)
    return first.to(tl.int32), tl.minimum(first + 1, size - 1).to(tl.int32), rest.to(COMPUTE) / (2 * frame)


@triton.jit
def pixel(x, inside):
    """Focal loss and probability of logits, and both their slopes."""
    z = tl.where(inside, -x, x)  # positive where the prediction is wrong
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    wrong = tl.where(z >= 0, larger, e * larger)
    right = tl.where(z >= 0, e * larger, larger)
    # log(1 + e), with the digits that 1 + e loses put back.
    sum_of = 1.0 + e
    log_term = tl.where(sum_of == 1.0, e, tl.log(sum_of) * e / tl.where(sum_of == 1.0, 1.0, sum_of - 1.0))
    cross_entropy = tl.where(z >= 0, z, 0.0) + log_term
    weighted = wrong * wrong * tl.where(inside, FOREGROUND, 1.0 - FOREGROUND)
    slope = weighted * (2.0 * right * cross_entropy + wrong)
    return weighted * cross_entropy, tl.where(inside, right, wrong), tl.where(inside, -slope, slope), wrong * right


@triton.jit(do_not_specialize=[*SIZES, "rows_of_logit", "columns_of_logit"])
def mask_loss_fwd_kernel(
    logits,  # [N, h, w]
    targets,  # [T, height, width] of one image
    focal_field,  # [N, h, w] slopes of the focal loss, of the probabilities' sum, and of those inside; or None
    p_field,
    p_inside_field,
    partial,  # [N, tiles, SUMS]
    first_mask: tl.int32,
    height: tl.int32,
    width: tl.int32,
    frame_height: tl.int32,
    frame_width: tl.int32,
    target_height: tl.int32,
    target_width: tl.int32,
    rows_of_logit: tl.int32,
    columns_of_logit: tl.int32,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = first_mask + t
    across = tl.cdiv(width, BLOCK_C)
    i = tile // across * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tile % across * BLOCK_C + tl.arange(0, BLOCK_C)
    first_y, end_y = start_of(i - 1, height, frame_height), start_of(i + 1, height, frame_height)
    first_x, end_x = start_of(j - 1, width, frame_width), start_of(j + 1, width, frame_width)
    end_y, end_x = tl.where(i < height, end_y, 0), tl.where(j < width, end_x, 0)
    mask, target = logits + n * height * width, targets + t * target_height * target_width
    focal_sum = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    p_sum = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    p_inside_sum = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    inside_sum = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    by_focal = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    by_p = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    by_p_inside = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    for row in range(rows_of_logit):
        y = first_y + row
        here_y = y < end_y
        above, below, down = source_of(tl.minimum(y, frame_height - 1), height, frame_height, COMPUTE)
        own_y = here_y & (above == i)
        row_weight = tl.where(here_y, tl.where(above == i, 1 - down, down), 0.0)[:, None]
        for column in range(columns_of_logit):
            x = first_x + column
            here_x = x < end_x
            left, right, along = source_of(tl.minimum(x, frame_width - 1), width, frame_width, COMPUTE)
            weight = row_weight * tl.where(here_x, tl.where(left == j, 1 - along, along), 0.0)[None, :]
            upper, lower = mask + above[:, None] * width, mask + below[:, None] * width
            share = down[:, None]
            on_left = tl.load(upper + left[None, :]) * (1 - share) + tl.load(lower + left[None, :]) * share
            on_right = tl.load(upper + right[None, :]) * (1 - share) + tl.load(lower + right[None, :]) * share
            value = on_left * (1 - along)[None, :] + on_right * along[None, :]
            known = (here_y & (y < target_height))[:, None] & (here_x & (x < target_width))[None, :]
            inside = tl.load(target + y.to(tl.int64)[:, None] * target_width + x[None, :], mask=known, other=0) > 0
            focal, p, focal_slope, p_slope = pixel(value, inside)
            own = own_y[:, None] & (here_x & (left == j))[None, :]
            focal_sum += tl.where(own, focal, 0.0)
            p_sum += tl.where(own, p, 0.0)
            p_inside_sum += tl.where(own & inside, p, 0.0)
            inside_sum += tl.where(own & inside, 1.0, 0.0)
            # Not a weight of 0: what is no number would stay so, in logits that have nothing to do with it.
            near = here_y[:, None] & here_x[None, :]
            by_focal += tl.where(near, focal_slope * weight, 0.0)
            by_p += tl.where(near, p_slope * weight, 0.0)
            by_p_inside += tl.where(near & inside, p_slope * weight, 0.0)
    sums = partial + (n * tl.num_programs(1) + tile) * SUMS
    tl.store(sums, tl.sum(tl.sum(focal_sum, 1), 0))
    tl.store(sums + 1, tl.sum(tl.sum(p_sum, 1), 0))
    tl.store(sums + 2, tl.sum(tl.sum(p_inside_sum, 1), 0))
    tl.store(sums + 3, tl.sum(tl.sum(inside_sum, 1), 0))
    if focal_field is not None:
        to = (n * height + i)[:, None] * width + j[None, :]
        stored = (i < height)[:, None] & (j < width)[None, :]
        tl.store(focal_field + to, by_focal, mask=stored)
        tl.store(p_field + to, by_p, mask=stored)
        tl.store(p_inside_field + to, by_p_inside, mask=stored)


@triton.jit(do_not_specialize=["tiles", "pixels", "size"])
def mask_loss_finish_kernel(
    focal_field,  # [N, size], becomes the focal loss's gradient; or None
    p_field,  # [N, size], becomes the dice loss's gradient
    p_inside_field,  # [N, size]
    partial,  # [N, tiles, SUMS]
    focal_loss,  # [N]
    dice_loss,  # [N]
    tiles: tl.int32,
    pixels: tl.int64,
    size: tl.int64,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program of a mask sums up its tiles, in the same order; the first one writes the losses."""
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    focal = tl.zeros([BLOCK_T], partial.dtype.element_ty)
    p, p_inside, inside = focal, focal, focal
    for start in range(0, tiles, BLOCK_T):
        at = start + tl.arange(0, BLOCK_T)
        tile, known = partial + (n * tiles + at) * SUMS, at < tiles
        focal += tl.load(tile, mask=known, other=0.0)
        p += tl.load(tile + 1, mask=known, other=0.0)
        p_inside += tl.load(tile + 2, mask=known, other=0.0)
        inside += tl.load(tile + 3, mask=known, other=0.0)
    numerator = 2.0 * tl.sum(p_inside, 0) + 1.0
    denominator = tl.sum(p, 0) + tl.sum(inside, 0) + 1.0
    if block == 0:
        tl.store(focal_loss + n, tl.sum(focal, 0) / pixels)
        tl.store(dice_loss + n, 1.0 - numerator / denominator)
    if focal_field is not None:
        i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        at, inside_field = n * size + i, i < size
        of_focal = tl.load(focal_field + at, mask=inside_field) / pixels
        of_p = tl.load(p_field + at, mask=inside_field) * (numerator / (denominator * denominator))
        of_p_inside = tl.load(p_inside_field + at, mask=inside_field) * (-2.0 / denominator)
        tl.store(focal_field + at, of_focal, mask=inside_field)
        tl.store(p_field + at, of_p + of_p_inside, mask=inside_field)


def mask_loss_triton(logits: Tensor, masks: Sequence[Tensor], with_gradients: bool) -> tuple[Tensor, ...]:
    """[N] focal, [N] dice, and the gradient [N, h, w] of each mask's own losses; empty where not asked.

    A launch for each image with masks, and one for all.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x = logits.detach().to(dtype).contiguous()
    count, height, width = x.shape
    losses = [x.new_empty(count) for _ in range(2)]
    fields = [x.new_empty(x.shape) if with_gradients else None for _ in range(3)]
    if count > 0:
        tiles = triton.cdiv(height, BLOCK_ROWS) * triton.cdiv(width, BLOCK_COLUMNS)
        partial = x.new_empty(count, tiles, SUMS.value)
        with on_device(x.device):
            _launch_images(x, masks, fields, partial)
            blocks = triton.cdiv(height * width, BLOCK_FINISH) if with_gradients else 1
            frame_height, frame_width = frame_of(masks)
            mask_loss_finish_kernel[(count, blocks)](
                *(*fields, partial, *losses, tiles, frame_height * frame_width, height * width),
                BLOCK_T=BLOCK_TILES,
                BLOCK=BLOCK_FINISH,
                enable_fp_fusion=True,
            )
    return *losses, *(x.new_empty(0) if field is None else field for field in fields[:2])


def _launch_images(x: Tensor, masks: Sequence[Tensor], fields: list[Tensor | None], partial: Tensor) -> None:
    height, width = x.shape[1:]
    frame = frame_of(masks)
    # A logit takes part in the pixels between its two neighbours; beside the first and the last lie half as many more.
    reach = [triton.cdiv(5 * across, 2 * size) + 1 for across, size in zip(frame, (height, width), strict=True)]
    compute = tl.float64 if x.dtype == torch.float64 else tl.float32
    first = 0
    for image in masks:
        if len(image) > 0:
            mask_loss_fwd_kernel[(len(image), partial.shape[1])](
                *(x, image.detach().contiguous().view(torch.uint8), *fields, partial),
                *(first, height, width, *frame, *image.shape[1:], *reach),
                COMPUTE=compute,
                BLOCK_R=BLOCK_ROWS,
                BLOCK_C=BLOCK_COLUMNS,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        first += len(image)
