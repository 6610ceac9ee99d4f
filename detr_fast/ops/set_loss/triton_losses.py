"""The arithmetic of the Triton kernels: what csrc/core/set_loss.h and csrc/cpu/class_loss.h are to the native ones."""

# Triton takes annotations of a kernel for the types to compile it for, so that most arguments have none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from detr_fast.ops.matching_cost.triton_impl import power


@triton.jit
def axis_slopes(a_low, a_high, b_low, b_high):
    """Along one axis: lengths of overlap and hull, and their slopes by a's low and high side.

    As PyTorch's: equal sides get half each, and a length of 0 passes its slope on.
    """
    high_is_lower = tl.where(a_high < b_high, 1.0, tl.where(a_high == b_high, 0.5, 0.0)).to(a_low.dtype)
    low_is_lower = tl.where(a_low < b_low, 1.0, tl.where(a_low == b_low, 0.5, 0.0)).to(a_low.dtype)
    inner = tl.minimum(a_high, b_high) - tl.maximum(a_low, b_low)
    outer = tl.maximum(a_high, b_high) - tl.minimum(a_low, b_low)
    overlaps = (inner >= 0).to(a_low.dtype)
    spans = (outer >= 0).to(a_low.dtype)
    inner_low, inner_high = -overlaps * (1 - low_is_lower), overlaps * high_is_lower
    outer_low, outer_high = -spans * low_is_lower, spans * (1 - high_is_lower)
    return tl.maximum(inner, 0.0), tl.maximum(outer, 0.0), inner_low, inner_high, outer_low, outer_high


@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def pair_losses(cx, cy, w, h, tcx, tcy, tw, th, TINY: tl.constexpr):
    """L1, 1 - GIoU, IoU of boxes and targets, and the slopes of 1 - GIoU; csrc/core/set_loss.h explains them."""
    x0, y0, x1, y1 = cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h
    tx0, ty0, tx1, ty1 = tcx - 0.5 * tw, tcy - 0.5 * th, tcx + 0.5 * tw, tcy + 0.5 * th
    inner_x, outer_x, inner_x0, inner_x1, outer_x0, outer_x1 = axis_slopes(x0, x1, tx0, tx1)
    inner_y, outer_y, inner_y0, inner_y1, outer_y0, outer_y1 = axis_slopes(y0, y1, ty0, ty1)
    width, height = x1 - x0, y1 - y0
    intersection = inner_x * inner_y
    united = width * height + (tx1 - tx0) * (ty1 - ty0) - intersection
    enclosing = outer_x * outer_y
    per_union, per_hull = 1.0 / tl.maximum(united, TINY), 1.0 / tl.maximum(enclosing, TINY)
    iou = intersection / tl.maximum(united, TINY)
    gap = (enclosing - united) / tl.maximum(enclosing, TINY)
    by_area = tl.where(united >= TINY, -iou * per_union, 0.0) + per_hull
    by_inner = per_union - by_area
    by_outer = -(per_hull - tl.where(enclosing >= TINY, gap * per_hull, 0.0))
    by_x0 = by_inner * inner_y * inner_x0 + by_outer * outer_y * outer_x0 - by_area * height
    by_x1 = by_inner * inner_y * inner_x1 + by_outer * outer_y * outer_x1 + by_area * height
    by_y0 = by_inner * inner_x * inner_y0 + by_outer * outer_x * outer_y0 - by_area * width
    by_y1 = by_inner * inner_x * inner_y1 + by_outer * outer_x * outer_y1 + by_area * width
    l1 = tl.abs(cx - tcx) + tl.abs(cy - tcy) + tl.abs(w - tw) + tl.abs(h - th)
    slopes = -(by_x0 + by_x1), -(by_y0 + by_y1), 0.5 * (by_x0 - by_x1), 0.5 * (by_y0 - by_y1)
    return l1, 1.0 - (iou - gap), iou, slopes[0], slopes[1], slopes[2], slopes[3]


@triton.jit
def store_slopes(to, inside, by_cx, by_cy, by_w, by_h):
    tl.store(to, by_cx, mask=inside)
    tl.store(to + 1, by_cy, mask=inside)
    tl.store(to + 2, by_w, mask=inside)
    tl.store(to + 3, by_h, mask=inside)


@triton.jit
def sigmoid_losses(x, present, score, VARIFOCAL: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    """Loss and slope of logits; ``present`` and the IoU ``score`` are those of each one's class."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    p = tl.where(x >= 0, larger, e * larger)
    rest = tl.where(x >= 0, e * larger, larger)
    # log(1 + e), with the digits that 1 + e loses put back.
    sum_of = 1.0 + e
    log_term = tl.where(sum_of == 1.0, e, tl.log(sum_of) * e / tl.where(sum_of == 1.0, 1.0, sum_of - 1.0))
    minus_log_p, minus_log_rest = tl.maximum(-x, 0.0) + log_term, tl.maximum(x, 0.0) + log_term
    if VARIFOCAL:
        weight = ALPHA * power(p, GAMMA)
        loss = tl.where(present, score * (minus_log_rest - score * x), weight * minus_log_rest)
        slope = tl.where(present, score * (p - score), weight * p)
    else:
        there, absent = ALPHA * power(rest, GAMMA), (1.0 - ALPHA) * power(p, GAMMA)
        loss = tl.where(present, there * minus_log_p, absent * minus_log_rest)
        slope = tl.where(
            present, -there * (GAMMA * p * minus_log_p + rest), absent * (GAMMA * rest * minus_log_rest + p)
        )
    return loss, slope


@triton.jit
def weights_of_layer(
    weight, labels, queries_of_layer, all_targets, all_queries, classes, BLOCK: tl.constexpr, COMPUTE: tl.constexpr
):
    """The sum of the weights of all queries' classes, by which the cross-entropy is divided."""
    place = tl.arange(0, BLOCK)
    weights = tl.zeros([BLOCK], COMPUTE)
    matched = tl.zeros([BLOCK], tl.int32)
    for start in range(0, all_targets, BLOCK):
        n = start + place
        query = tl.load(queries_of_layer + n, mask=n < all_targets, other=-1)
        label = tl.load(labels + n, mask=query >= 0, other=0)
        known = (query >= 0) & (label >= 0) & (label < classes)
        weights += tl.load(weight + label, mask=known, other=0.0).to(COMPUTE)
        matched += (query >= 0).to(tl.int32)
    no_object = tl.load(weight + classes - 1).to(COMPUTE)
    return tl.sum(weights, 0) + no_object * (all_queries - tl.sum(matched, 0)).to(COMPUTE)
