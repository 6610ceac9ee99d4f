"""The losses in Triton: one kernel for losses and gradients of blocks of queries, one that sums up, one for backward.

Its speed has not been measured: it was written and checked on machines without a GPU.
"""

# Triton takes annotations of a kernel for the types to compile it for, so that most arguments have none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast.ops._triton import on_device
from detr_fast.ops.matching_cost.triton_impl import (
    COUNT_BITS,
    COUNT_MASK,
    _alike,
    _spans,
    load_boxes,
    softmax_statistics,
)
from detr_fast.ops.matching_cost.triton_words import as_words, distances, pick
from detr_fast.ops.matching_cost.types import PackedTargets, PaddedTargets
from detr_fast.ops.set_loss.gradient import stacked
from detr_fast.ops.set_loss.triton_losses import pair_losses, sigmoid_losses, sign, store_slopes, weights_of_layer
from detr_fast.ops.set_loss.types import ClassLoss, CrossEntropy, Focal, Varifocal, result_sizes

# As for the matching cost, whose logits these are: a program takes 16 queries of one image of one layer.
BLOCK_QUERIES = 16
# COCO's 92 logits are two steps of 64. Steps of 128 take 176 registers a thread instead of 109.
BLOCK_CLASSES = {torch.float32: 64, torch.float64: 32}
BLOCK_TARGETS = 16
WARPS = 8
# Targets of the whole batch, whose weights every program adds up: COCO's 16 images have 118.
BLOCK_ALL_TARGETS = 128

IMAGES_PER_LAUNCH = 32
LAYERS_PER_LAUNCH = 8

# Of a block of queries: class loss, weights, L1, 1 - GIoU, matched, right class, objects; and its image's targets.
COLUMNS = tl.constexpr(8)
BLOCK_IMAGES = 32
BLOCK_BACKWARD = 1024
# Sides of boxes are compared, and areas subtracted that may be equal: both must be rounded alike.
FUSION = False


SIZES = ["first_layer", "first_image", "images_here", "images", "queries", "classes", "all_targets"]
STRIDES = ["logits_image", "logits_query", "boxes_image", "boxes_query"]


@triton.jit(do_not_specialize=SIZES + STRIDES)
def set_loss_fwd_kernel(
    logits,  # of layer 0
    boxes,
    labels,  # [N]
    target_boxes,  # [N, 4]
    query_of_target,  # [L, N]
    weight,  # [classes], or None
    num_boxes,  # [1]
    offsets,  # [B + 1] of padded targets, or None
    partial,  # [L, B, blocks of queries, COLUMNS]
    logit_slope,  # [L, B, Q, classes], or None, and then so are the others
    l1_slope,  # [L, B, Q, 4]
    giou_slope,
    image_words,
    logits_words,  # of each layer, the distance from layer 0
    boxes_words,
    first_layer: tl.int32,
    first_image: tl.int32,
    images_here: tl.int32,
    images: tl.int32,
    queries: tl.int32,
    classes: tl.int32,
    all_targets: tl.int32,
    logits_image: tl.int64,
    logits_query: tl.int64,
    boxes_image: tl.int64,
    boxes_query: tl.int64,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    COMPUTE: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IMAGES: tl.constexpr,
    LAYERS: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_Q)
    block = tl.program_id(0) % blocks
    image_here = tl.program_id(0) // blocks % images_here
    layer_here = tl.program_id(0) // blocks // images_here
    image, layer = (first_image + image_here).to(tl.int64), (first_layer + layer_here).to(tl.int64)
    queries_of_layer = query_of_target + layer * all_targets
    if offsets is None:
        span = pick(image_words, image_here, IMAGES)
        first_target = span >> COUNT_BITS
        targets = (span & COUNT_MASK).to(tl.int32)
    else:
        # Nobody has looked at them before: nothing outside the room for targets is read.
        first_target = tl.maximum(tl.load(offsets + image), 0)
        targets = (tl.minimum(tl.load(offsets + image + 1), all_targets) - first_target).to(tl.int32)
        all_targets = tl.minimum(tl.load(offsets + images), all_targets).to(tl.int32)

    q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = q < queries
    target = tl.full([BLOCK_Q], -1, tl.int32)
    for start in range(0, targets, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        query = tl.load(queries_of_layer + first_target + t, mask=t < targets, other=-1)
        target = tl.maximum(target, tl.max(tl.where(query[:, None] == q[None, :], t[:, None], -1), 0))
    matched = inside & (target >= 0)
    n = first_target + tl.maximum(target, 0)
    label = tl.load(labels + n, mask=matched, other=-1)
    if KIND == 0:
        label = tl.where(matched, label, (classes - 1).to(tl.int64))
    known = inside & (label >= 0) & (label < classes)

    rows = image * queries + layer * images * queries + q  # of the results
    per_box = 1.0 / tl.load(num_boxes).to(COMPUTE)
    boxes_rows = boxes + pick(boxes_words, layer_here, LAYERS) + image * boxes_image + q * boxes_query
    cx, cy, w, h = load_boxes(boxes_rows, matched, COMPUTE)
    tcx, tcy, tw, th = load_boxes(target_boxes + n * 4, matched, COMPUTE)
    l1, gap, iou, by_cx, by_cy, by_w, by_h = pair_losses(cx, cy, w, h, tcx, tcy, tw, th, TINY)
    if logit_slope is not None:
        scale = tl.where(matched, per_box, 0.0)
        at = l1_slope + rows * 4
        store_slopes(
            at, inside, sign(cx - tcx) * scale, sign(cy - tcy) * scale, sign(w - tw) * scale, sign(h - th) * scale
        )
        # Of boxes without a target all numbers above are 0 and finite.
        store_slopes(giou_slope + rows * 4, inside, by_cx * scale, by_cy * scale, by_w * scale, by_h * scale)

    logits_rows = logits + pick(logits_words, layer_here, LAYERS) + image * logits_image + q * logits_query
    highest, per_sum = softmax_statistics(logits_rows, inside, classes, BLOCK_C, COMPUTE)
    row_weight = tl.zeros([BLOCK_Q], COMPUTE)
    row_loss = tl.zeros([BLOCK_Q], COMPUTE)
    factor = tl.zeros([BLOCK_Q], COMPUTE) + per_box
    if KIND == 0:
        total = weights_of_layer(
            weight, labels, queries_of_layer, all_targets, images.to(tl.int64) * queries, classes, BLOCK_N, COMPUTE
        )
        # A label out of range reads nothing, and makes a loss that is no number.
        row_weight = tl.load(weight + label, mask=known, other=float("nan")).to(COMPUTE)
        at_label = tl.load(logits_rows + label, mask=known, other=float("nan")).to(COMPUTE)
        row_loss = row_weight * ((highest - at_label) - tl.log(per_sum))
        factor = row_weight / total
    first = tl.zeros([BLOCK_Q], tl.int32) + classes
    place = tl.arange(0, BLOCK_C)
    for start in range(0, classes, BLOCK_C):
        c = start + place
        here = inside[:, None] & (c < classes)[None, :]
        x = tl.load(logits_rows[:, None] + c[None, :], mask=here, other=float("-inf")).to(COMPUTE)
        first = tl.minimum(first, tl.min(tl.where(here & (x == highest[:, None]), c[None, :], classes), 1))
        present = label[:, None] == c[None, :]
        if KIND == 0:
            slope = tl.exp(x - highest[:, None]) * per_sum[:, None] - present.to(COMPUTE)
        else:
            loss, slope = sigmoid_losses(tl.where(here, x, 0.0), present, iou[:, None], KIND == 2, ALPHA, GAMMA)
            row_loss += tl.sum(tl.where(here, loss, 0.0), 1)
        if logit_slope is not None:
            tl.store(logit_slope + rows[:, None] * classes + c[None, :], slope * factor[:, None], mask=here)
    if KIND != 0:
        row_loss = tl.where(matched & (known == 0), float("nan"), row_loss)
    objects = (first != classes - 1) if KIND == 0 else (highest > 0)

    to = partial + (((layer * images + image) * blocks) + block) * COLUMNS
    tl.store(to, tl.sum(tl.where(inside, row_loss, 0.0), 0))
    tl.store(to + 1, tl.sum(tl.where(inside, row_weight, 0.0), 0))
    tl.store(to + 2, tl.sum(tl.where(matched, l1, 0.0), 0))
    tl.store(to + 3, tl.sum(tl.where(matched, gap, 0.0), 0))
    tl.store(to + 4, tl.sum(matched.to(COMPUTE), 0))
    tl.store(to + 5, tl.sum((matched & (first == label)).to(COMPUTE), 0))
    tl.store(to + 6, tl.sum((inside & objects).to(COMPUTE), 0))
    tl.store(to + 7, targets.to(COMPUTE))


@triton.jit(do_not_specialize=["layers", "images", "blocks"])
def set_loss_finish_kernel(
    partial,  # [L, B, blocks, COLUMNS]
    num_boxes,  # [1]
    losses,  # [3, L]
    metrics,  # [2, L]
    layers: tl.int32,
    images: tl.int32,
    blocks: tl.int32,
    SOFTMAX: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program a layer, which adds up in one order whatever ran first."""
    layer = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    sums = tl.zeros([BLOCK_B, COLUMNS], tl.float64)  # of every BLOCK_B-th image
    miscounted = tl.zeros([BLOCK_B], tl.float64)
    for start in range(0, images, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        of_image = tl.zeros([BLOCK_B, COLUMNS], tl.float64)
        for block in range(blocks):
            at = partial + ((layer.to(tl.int64) * images + b) * blocks + block)[:, None] * COLUMNS + column[None, :]
            of_image += tl.load(at, mask=(b < images)[:, None], other=0.0).to(tl.float64)
        sums += of_image
        objects = tl.sum(tl.where(column[None, :] == 6, of_image, 0.0), 1)
        counted_in_every_block = tl.sum(tl.where(column[None, :] == 7, of_image, 0.0), 1)
        miscounted += tl.abs(objects - counted_in_every_block / blocks)
    total = tl.sum(sums, 0)
    divisor = tl.load(num_boxes).to(tl.float64)
    class_loss = tl.sum(tl.where(column == 0, total, 0.0), 0)
    weights = tl.sum(tl.where(column == 1, total, 0.0), 0)
    matched = tl.sum(tl.where(column == 4, total, 0.0), 0)
    right = tl.sum(tl.where(column == 5, total, 0.0), 0)
    tl.store(losses + layer, class_loss / (weights if SOFTMAX else divisor))
    tl.store(losses + layers + layer, tl.sum(tl.where(column == 2, total, 0.0), 0) / divisor)
    tl.store(losses + 2 * layers + layer, tl.sum(tl.where(column == 3, total, 0.0), 0) / divisor)
    tl.store(metrics + layer, 100.0 - 100.0 * right / tl.maximum(matched, 1.0))
    tl.store(metrics + layers + layer, tl.sum(miscounted, 0) / images)


@triton.jit(do_not_specialize=["layers", "logits_of_layer", "boxes_of_layer"])
def set_loss_bwd_kernel(
    upstream,  # [3, L]
    logit_slope,
    l1_slope,
    giou_slope,
    logit_gradient,
    box_gradient,
    layers: tl.int32,
    logits_of_layer: tl.int64,  # numbers in a layer
    boxes_of_layer: tl.int64,
    BLOCK: tl.constexpr,
):
    """A program scales a block of a layer's logits' gradients, or, in the last ones of a layer, of its boxes'."""
    logit_blocks = tl.cdiv(logits_of_layer, BLOCK)
    blocks = logit_blocks + tl.cdiv(boxes_of_layer, BLOCK)
    layer, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if block < logit_blocks:
        i = block * BLOCK + tl.arange(0, BLOCK)
        at, inside = layer * logits_of_layer + i, i < logits_of_layer
        slope = tl.load(logit_slope + at, mask=inside)
        tl.store(logit_gradient + at, slope * tl.load(upstream + layer), mask=inside)
    else:
        i = (block - logit_blocks) * BLOCK + tl.arange(0, BLOCK)
        at, inside = layer * boxes_of_layer + i, i < boxes_of_layer
        l1 = tl.load(l1_slope + at, mask=inside) * tl.load(upstream + layers + layer)
        giou = tl.load(giou_slope + at, mask=inside) * tl.load(upstream + 2 * layers + layer)
        tl.store(box_gradient + at, l1 + giou, mask=inside)


def set_loss_triton(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets | PaddedTargets,
    query_of_target: Tensor,
    class_loss: ClassLoss,
    num_boxes: Tensor,
    with_slopes: bool,
) -> tuple[Tensor, ...]:
    """As ``set_loss``. Two launches for up to 8 layers and 32 images; nothing is copied to or from the device."""
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    layers, (batch, queries, classes) = len(logits), logits[0].shape
    shape = (batch, queries, classes) if with_slopes else (0, 0, 0)
    results = tuple(logits[0].new_empty(size, dtype=dtype) for size in result_sizes(layers, *shape))
    slopes = results[2:] if with_slopes else (None, None, None)
    logits, boxes = _alike(logits, dtype), _alike(boxes, dtype)
    labels, target_boxes = targets.labels.contiguous(), targets.boxes.detach().contiguous()
    weight = class_loss.weights(classes, results[0]) if isinstance(class_loss, CrossEntropy) else None
    blocks = triton.cdiv(queries, BLOCK_QUERIES)
    partial = logits[0].new_empty((layers, batch, blocks, COLUMNS.value), dtype=dtype)
    offsets: Tensor | None = None
    spans: list[int] = []
    if isinstance(targets, PaddedTargets):
        offsets = targets.offsets.contiguous()
    else:
        spans = _spans(targets.num_targets)
    of_targets = (labels, target_boxes, query_of_target.contiguous(), weight, num_boxes, offsets)
    tensors, constants = (logits[0], boxes[0], *of_targets, partial), fwd_constants(class_loss, dtype)
    with on_device(logits[0].device):
        for first_layer in range(0, layers, LAYERS_PER_LAUNCH):
            for first_image in range(0, batch, IMAGES_PER_LAUNCH):
                images_here = min(IMAGES_PER_LAUNCH, batch - first_image)
                grid = (min(LAYERS_PER_LAUNCH, layers - first_layer) * images_here * blocks,)
                set_loss_fwd_kernel[grid](
                    *tensors,
                    *slopes,
                    as_words(spans[first_image:], IMAGES_PER_LAUNCH),
                    *(distances(x, first_layer, LAYERS_PER_LAUNCH) for x in (logits, boxes)),
                    first_layer,
                    first_image,
                    images_here,
                    batch,
                    queries,
                    classes,
                    len(labels),
                    *logits[0].stride()[:2],
                    *boxes[0].stride()[:2],
                    **constants,
                )
        softmax = weight is not None
        set_loss_finish_kernel[(layers,)](
            partial, num_boxes, *results[:2], layers, batch, blocks, SOFTMAX=softmax, BLOCK_B=BLOCK_IMAGES
        )
    return results


def fwd_constants(class_loss: ClassLoss, dtype: torch.dtype) -> dict[str, Any]:
    """What ``set_loss_fwd_kernel`` is compiled for."""
    sigmoid = Focal(0.0, 0.0) if isinstance(class_loss, CrossEntropy) else class_loss
    return {
        "KIND": [CrossEntropy, Focal, Varifocal].index(type(class_loss)),
        "ALPHA": float(sigmoid.alpha),
        "GAMMA": float(sigmoid.gamma),
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "TINY": torch.finfo(dtype).tiny,
        "BLOCK_Q": BLOCK_QUERIES,
        "BLOCK_C": BLOCK_CLASSES[dtype],
        "BLOCK_T": BLOCK_TARGETS,
        "BLOCK_N": BLOCK_ALL_TARGETS,
        "IMAGES": IMAGES_PER_LAUNCH,
        "LAYERS": LAYERS_PER_LAUNCH,
        "num_warps": WARPS,
        "enable_fp_fusion": FUSION,
    }


def set_loss_backward_triton(
    upstream: Tensor | Sequence[Tensor | None], logit_slope: Tensor, l1_slope: Tensor, giou_slope: Tensor
) -> tuple[Tensor, Tensor]:
    logit_gradient, box_gradient = torch.empty_like(logit_slope), torch.empty_like(l1_slope)
    layers, logits_of_layer, boxes_of_layer = len(logit_slope), logit_slope[0].numel(), l1_slope[0].numel()
    blocks = triton.cdiv(logits_of_layer, BLOCK_BACKWARD) + triton.cdiv(boxes_of_layer, BLOCK_BACKWARD)
    if blocks > 0:
        with on_device(logit_slope.device):
            set_loss_bwd_kernel[(layers * blocks,)](
                stacked(upstream),
                *(logit_slope, l1_slope, giou_slope, logit_gradient, box_gradient),
                *(layers, logits_of_layer, boxes_of_layer),
                BLOCK=BLOCK_BACKWARD,
            )
    return logit_gradient, box_gradient
