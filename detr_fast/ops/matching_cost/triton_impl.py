"""The matching cost in Triton: one kernel for the costs, one for those that are no numbers.

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
from detr_fast.ops.matching_cost.reference import LARGEST_COST
from detr_fast.ops.matching_cost.triton_words import as_words, distances, pick
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets

UNUSABLE_FROM = tl.constexpr(LARGEST_COST)

# A program takes BLOCK_QUERIES queries of one image of one layer and all targets of that image. The statistics of a
# query's softmax (one exponential a class) are then computed once, where a program for each target would repeat them T
# times; and its logits are still in the L1 cache when the targets' classes are picked from them. 16 queries make 336
# programs of six layers and eight images of 100 queries, more than a GPU has multiprocessors, and waste 12 of 112
# lanes; a row of 16 costs is whole memory sectors.
BLOCK_QUERIES = 16
# COCO's 92 logits are one step, and so wait for memory once; in float64 they take two, for as many registers.
BLOCK_CLASSES = {torch.float32: 128, torch.float64: 64}
# An image of COCO has about 7 targets: one step for most images.
BLOCK_TARGETS = 16
# 64 registers a thread, where four warps take 128: as many programs of twice the warps fit on a multiprocessor.
WARPS = 8

# Counts and layers travel as arguments; a call with more of them takes several launches.
IMAGES_PER_LAUNCH = 32
LAYERS_PER_LAUNCH = 8

# The number of an image is 2^30 times its first target's place among all, plus its count.
COUNT_BITS = tl.constexpr(30)
COUNT_MASK = tl.constexpr((1 << 30) - 1)

BLOCK_FINISH = 1024

# A fused multiply-add rounds one of two equal areas and not the other, and GIoU takes the difference of two areas.
FUSION = False


@triton.jit
def softmax_statistics(logits, valid, classes, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """Of rows at ``logits`` [queries]: the highest logit, and 1 / sum of e^(logit - highest).

    NaN and +inf in a row, and -inf all over it, make the second a NaN, as torch's softmax does.
    """
    # The highest first and the sum after it: the second reading comes from the L1 cache, where a sum that is rescaled
    # as the highest rises takes every exponential twice.
    ROWS: tl.constexpr = logits.shape[0]
    place = tl.arange(0, BLOCK)
    highest = tl.full([ROWS, BLOCK], float("-inf"), COMPUTE)
    for start in range(0, classes, BLOCK):
        inside = valid[:, None] & (start + place < classes)[None, :]
        x = tl.load(logits[:, None] + (start + place)[None, :], mask=inside, other=float("-inf")).to(COMPUTE)
        highest = tl.maximum(highest, x)
    row_highest = tl.max(highest, 1)
    total = tl.zeros([ROWS, BLOCK], COMPUTE)
    for start in range(0, classes, BLOCK):
        inside = valid[:, None] & (start + place < classes)[None, :]
        x = tl.load(logits[:, None] + (start + place)[None, :], mask=inside, other=float("-inf")).to(COMPUTE)
        total += tl.exp(x - row_highest[:, None])
    return row_highest, 1.0 / tl.sum(total, 1)


@triton.jit
def softmax_term(x, highest, scale):
    """Minus the probability of logits [targets, queries], given their queries' statistics."""
    return -tl.exp(x - highest[None, :]) * scale[None, :]


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """x^EXPONENT of x in [0, 1]."""
    if EXPONENT == 2.0:
        return x * x
    elif EXPONENT == 0.0:
        return x * 0.0 + 1.0
    else:
        return tl.exp(EXPONENT * tl.log(x))


@triton.jit
def focal_term(x, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    """Deformable DETR's: the focal loss of the class being there, less that of it not being there."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    p = tl.where(x >= 0, larger, e * larger)
    q = tl.where(x >= 0, e * larger, larger)  # 1 - p, without the cancellation
    there = -ALPHA * power(q, GAMMA) * tl.log(p + 1e-8)
    absent = -(1.0 - ALPHA) * power(p, GAMMA) * tl.log(q + 1e-8)
    return there - absent


@triton.jit
def load_boxes(boxes, valid, COMPUTE: tl.constexpr):
    """cx, cy, w, h of boxes at pointers."""
    cx = tl.load(boxes, mask=valid, other=0.0).to(COMPUTE)
    cy = tl.load(boxes + 1, mask=valid, other=0.0).to(COMPUTE)
    w = tl.load(boxes + 2, mask=valid, other=0.0).to(COMPUTE)
    h = tl.load(boxes + 3, mask=valid, other=0.0).to(COMPUTE)
    return cx, cy, w, h


@triton.jit
def giou(acx, acy, aw, ah, bcx, bcy, bw, bh, TINY: tl.constexpr):
    """Rezatofighi et al. 2019, equation 1. A zero area divides as TINY: 0 / 0 is 0."""
    ax0, ay0, ax1, ay1 = acx - 0.5 * aw, acy - 0.5 * ah, acx + 0.5 * aw, acy + 0.5 * ah
    bx0, by0, bx1, by1 = bcx - 0.5 * bw, bcy - 0.5 * bh, bcx + 0.5 * bw, bcy + 0.5 * bh
    inner_w = tl.maximum(tl.minimum(ax1, bx1) - tl.maximum(ax0, bx0), 0.0)
    inner_h = tl.maximum(tl.minimum(ay1, by1) - tl.maximum(ay0, by0), 0.0)
    intersection = inner_w * inner_h
    united = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    outer_w = tl.maximum(tl.maximum(ax1, bx1) - tl.minimum(ax0, bx0), 0.0)
    outer_h = tl.maximum(tl.maximum(ay1, by1) - tl.minimum(ay0, by0), 0.0)
    enclosing = outer_w * outer_h
    return intersection / tl.maximum(united, TINY) - (enclosing - united) / tl.maximum(enclosing, TINY)


# Sizes and strides are not specialised on: no count of targets, queries or classes compiles anything anew.
SIZES = ["first_layer", "first_image", "images_here", "images", "queries", "classes", "all_targets"]
STRIDES = ["logits_image", "logits_query", "boxes_image", "boxes_query", "extra_target"]


@triton.jit(do_not_specialize=SIZES + STRIDES)
def matching_cost_fwd_kernel(
    logits,  # of layer 0
    boxes,
    extra,  # or None
    labels,  # [N]
    target_boxes,  # [N, 4]
    cost,  # [L, N, Q]
    unusable,  # [L, B, blocks of queries]
    spans,  # [B]
    image_words,
    logits_words,  # of each layer, the distance from layer 0
    boxes_words,
    extra_words,
    first_layer: tl.int32,
    first_image: tl.int32,
    images_here: tl.int32,
    images: tl.int32,
    queries: tl.int32,
    classes: tl.int32,
    all_targets: tl.int64,
    logits_image: tl.int64,
    logits_query: tl.int64,
    boxes_image: tl.int64,
    boxes_query: tl.int64,
    extra_target: tl.int64,
    COST_CLASS: tl.constexpr,  # weights are constants: as arguments they would be rounded to float32
    COST_BBOX: tl.constexpr,
    COST_GIOU: tl.constexpr,
    FOCAL: tl.constexpr,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    COMPUTE: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    IMAGES: tl.constexpr,
    LAYERS: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_Q)
    block = tl.program_id(0) % blocks
    image_here = tl.program_id(0) // blocks % images_here
    layer_here = tl.program_id(0) // blocks // images_here
    image = (first_image + image_here).to(tl.int64)
    layer = (first_layer + layer_here).to(tl.int64)
    span = pick(image_words, image_here, IMAGES)
    first_target = span >> COUNT_BITS
    targets = (span & COUNT_MASK).to(tl.int32)
    tl.store(spans + image, span)  # the same from every layer and block

    q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_valid = q < queries
    logits_rows = logits + pick(logits_words, layer_here, LAYERS) + image * logits_image + q * logits_query
    boxes_rows = boxes + pick(boxes_words, layer_here, LAYERS) + image * boxes_image + q * boxes_query
    cx, cy, w, h = load_boxes(boxes_rows, query_valid, COMPUTE)
    if not FOCAL:
        classes_needed = tl.where(targets > 0, classes, 0)
        highest, scale = softmax_statistics(logits_rows, query_valid, classes_needed, BLOCK_C, COMPUTE)

    bad = tl.zeros([BLOCK_T, BLOCK_Q], tl.int32)
    for start in range(0, targets, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        target_valid = t < targets
        n = first_target + t
        valid = target_valid[:, None] & query_valid[None, :]
        label = tl.load(labels + n, mask=target_valid, other=0)
        # A label out of range makes a cost that is no number; nothing is read in its place.
        known = valid & ((label >= 0) & (label < classes))[:, None]
        x = tl.load(logits_rows[None, :] + label[:, None], mask=known, other=float("nan")).to(COMPUTE)
        class_term = focal_term(x, ALPHA, GAMMA) if FOCAL else softmax_term(x, highest, scale)
        tcx, tcy, tw, th = load_boxes(target_boxes + n * 4, target_valid, COMPUTE)
        tcx, tcy, tw, th = tcx[:, None], tcy[:, None], tw[:, None], th[:, None]
        qcx, qcy, qw, qh = cx[None, :], cy[None, :], w[None, :], h[None, :]
        l1 = tl.abs(tcx - qcx) + tl.abs(tcy - qcy) + tl.abs(tw - qw) + tl.abs(th - qh)
        overlap = giou(tcx, tcy, tw, th, qcx, qcy, qw, qh, TINY)
        tile = COST_CLASS * class_term + COST_BBOX * l1 - COST_GIOU * overlap
        if extra is not None:
            extra_rows = extra + pick(extra_words, layer_here, LAYERS) + n * extra_target
            tile += tl.load(extra_rows[:, None] + q[None, :], mask=valid, other=0.0).to(COMPUTE)
        bad += tl.where(tl.abs(tile) < UNUSABLE_FROM, 0, valid.to(tl.int32))
        rows = cost + (layer * all_targets + n) * queries
        tl.store(rows[:, None] + q[None, :], tile, mask=valid)
    tl.store(unusable + (layer * images + image) * blocks + block, tl.sum(tl.sum(bad, 1), 0))


@triton.jit(do_not_specialize=["images", "queries", "blocks", "all_targets"])
def matching_cost_finish_kernel(
    cost,  # [L, N, Q]
    unusable,  # [L, B, blocks]
    spans,  # [B]
    num_nonfinite,  # [L, B]
    images: tl.int32,
    queries: tl.int32,
    blocks: tl.int32,
    all_targets: tl.int64,
    BLOCK: tl.constexpr,
):
    """One program a layer and image. Where all costs are numbers it only adds up counts."""
    problem = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int64)
    for start in range(0, blocks, BLOCK):
        here = problem.to(tl.int64) * blocks + start + place
        counts += tl.load(unusable + here, mask=start + place < blocks, other=0)
    count = tl.sum(counts, 0)
    tl.store(num_nonfinite + problem, count)

    span = tl.load(spans + problem % images)
    targets = span & COUNT_MASK
    tile = cost + ((problem // images).to(tl.int64) * all_targets + (span >> COUNT_BITS)) * queries
    size = tl.where(count > 0, targets * queries, 0)
    lowest = tl.zeros([BLOCK], tl.float64)
    highest = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        x = tl.load(tile + start + place, mask=start + place < size, other=0.0)
        x = tl.where(tl.abs(x) < UNUSABLE_FROM, x, 0.0).to(tl.float64)
        lowest = tl.minimum(lowest, x)
        highest = tl.maximum(highest, x)
    # More than all pairs of any matching can differ by: one such pair less is always worth it.
    pairs = tl.minimum(targets, queries) + 1
    top = tl.max(highest, 0)
    penalty = top + (top - tl.min(lowest, 0) + 1.0) * pairs.to(tl.float64)
    for start in range(0, size, BLOCK):
        inside = start + place < size
        x = tl.load(tile + start + place, mask=inside, other=0.0)
        tl.store(tile + start + place, tl.where(tl.abs(x) < UNUSABLE_FROM, x, penalty.to(x.dtype)), mask=inside)


def matching_cost_triton(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets,
    weights: CostWeights,
    extra_cost: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``matching_cost``. Two launches for up to 8 layers and 32 images; nothing is copied to or from the device.

    It can be captured in a CUDA graph once a call outside of it has compiled the kernels. A graph holds the counts,
    the shapes and the addresses: a replay reads what then lies in the same tensors.
    """
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    layers, (batch, queries, _), total = len(logits), logits[0].shape, len(targets.labels)
    if total == 0 or queries == 0:
        empty = logits[0].new_empty((layers, total, queries), dtype=dtype)
        return empty, empty.new_zeros((layers, batch), dtype=torch.int64)
    launch = Launches(logits, boxes, targets, weights, extra_cost, dtype)
    with on_device(logits[0].device):
        for first_layer in range(0, layers, LAYERS_PER_LAUNCH):
            for first_image in range(0, batch, IMAGES_PER_LAUNCH):
                launch.costs(first_layer, first_image)
        return launch.finish()


class Launches:
    """The arguments of one call's launches; holds the tensors that they point into."""

    def __init__(
        self,
        logits: Sequence[Tensor],
        boxes: Sequence[Tensor],
        targets: PackedTargets,
        weights: CostWeights,
        extra_cost: Sequence[Tensor] | None,
        dtype: torch.dtype,
    ) -> None:
        self.logits, self.boxes = _alike(logits, dtype), _alike(boxes, dtype)
        self.extra = None if extra_cost is None else _alike(extra_cost, dtype)
        self.labels, self.target_boxes = targets.labels.contiguous(), targets.boxes.detach().contiguous()
        self.spans = _spans(targets.num_targets)
        self.weights = weights
        layers, (batch, queries, self.classes) = len(logits), logits[0].shape
        self.blocks = triton.cdiv(queries, BLOCK_QUERIES)
        new = self.labels.new_empty
        self.cost = new((layers, len(self.labels), queries), dtype=dtype)
        self.unusable = new((layers, batch, self.blocks), dtype=torch.int32)
        self.span_of_image = new(batch)

    def costs(self, first_layer: int, first_image: int) -> None:
        """The costs of the layers and images that one launch can hold."""
        layers, batch, _ = self.unusable.shape
        layers_here = min(LAYERS_PER_LAUNCH, layers - first_layer)
        images_here = min(IMAGES_PER_LAUNCH, batch - first_image)
        matching_cost_fwd_kernel[(layers_here * images_here * self.blocks,)](
            *self.tensors(),
            as_words(self.spans[first_image:], IMAGES_PER_LAUNCH),
            *(distances(x, first_layer, LAYERS_PER_LAUNCH) for x in (self.logits, self.boxes, self.extra)),
            first_layer,
            first_image,
            images_here,
            batch,
            self.cost.shape[2],
            self.classes,
            self.cost.shape[1],
            *self.logits[0].stride()[:2],
            *self.boxes[0].stride()[:2],
            0 if self.extra is None else self.extra[0].stride(0),
            **fwd_constants(self.weights, self.cost.dtype),
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        extra = None if self.extra is None else self.extra[0]
        inputs = (self.logits[0], self.boxes[0], extra, self.labels, self.target_boxes)
        return *inputs, self.cost, self.unusable, self.span_of_image

    def finish(self) -> tuple[Tensor, Tensor]:
        layers, batch, blocks = self.unusable.shape
        num_nonfinite = self.labels.new_empty((layers, batch))
        _, total, queries = self.cost.shape
        tensors = (self.cost, self.unusable, self.span_of_image, num_nonfinite)
        matching_cost_finish_kernel[(layers * batch,)](
            *tensors, batch, queries, blocks, total, BLOCK=BLOCK_FINISH, enable_fp_fusion=FUSION
        )
        return self.cost, num_nonfinite


def fwd_constants(weights: CostWeights, dtype: torch.dtype) -> dict[str, Any]:
    """What ``matching_cost_fwd_kernel`` is compiled for."""
    return {
        "COST_CLASS": float(weights.cost_class),
        "COST_BBOX": float(weights.cost_bbox),
        "COST_GIOU": float(weights.cost_giou),
        "FOCAL": weights.focal,
        "ALPHA": float(weights.alpha),
        "GAMMA": float(weights.gamma),
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "TINY": torch.finfo(dtype).tiny,
        "BLOCK_Q": BLOCK_QUERIES,
        "BLOCK_C": BLOCK_CLASSES[dtype],
        "BLOCK_T": BLOCK_TARGETS,
        "IMAGES": IMAGES_PER_LAUNCH,
        "LAYERS": LAYERS_PER_LAUNCH,
        "num_warps": WARPS,
        "enable_fp_fusion": FUSION,
    }


def _spans(num_targets: Sequence[int]) -> list[int]:
    spans, first = [], 0
    for count in num_targets:
        spans.append((first << COUNT_BITS.value) + count)
        first += count
    return spans


def _alike(layers: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The layers as they lie, where they have one dtype, one set of strides, and a contiguous last dimension."""
    stride = layers[0].stride()
    layers = [x.detach() for x in layers]
    if any(x.dtype != layers[0].dtype for x in layers):
        layers = [x.to(dtype) for x in layers]
    if stride[-1] == 1 and all(x.stride() == stride for x in layers):
        return layers
    return [x.contiguous() for x in layers]
