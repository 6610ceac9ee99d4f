"""The forward kernels of attention: a pass over the keys with a running softmax, and the sum of a split pass's parts.

Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao 2023, "FlashAttention-2".
"""

# Triton takes annotations of a kernel for the types to compile it for, so that most arguments have none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from detr_fast.ops._triton_dropout import keep_tile
from detr_fast.ops.attention.triton_tiles import find_work, head_of, load_tile, product, span, store_tile

# Sizes are not specialised on: no number of images, tokens or heads and no stride compiles anything anew.
SIZES = ["images", "all_queries", "heads", "splits", "threshold"]
STRIDES = ["query_token", "query_head", "key_token", "key_head", "value_token", "value_head"]


@triton.jit
def attend(
    acc,
    total,
    highest,
    q,
    query_head,
    queries,
    query_token,
    key_head,
    value_head,
    key_token,
    value_token,
    start,
    keys,
    scale_log2,
    seed,
    threshold,
    image,
    head,
    rows,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys into the running sums. ``keys`` is how many the image has, None where the block is full."""
    columns = start + tl.arange(0, BLOCK_K)
    k = load_tile(key_head, columns, keys, key_token, SIZE, BLOCK_E, UNIT).to(DOT)
    scores = product(
        q, query_head, rows, queries, query_token, k, key_head, columns, keys, key_token,
        SIZE, BLOCK_E, UNIT, CHUNK, PRECISION,
    )  # fmt: skip
    if keys is not None:
        scores = tl.where(columns[None, :] < keys, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - higher[:, None])
    rescale = tl.exp2(highest - higher)
    total = total * rescale + tl.sum(weights, 1)
    if DROPOUT:
        weights = tl.where(keep_tile(seed, threshold, image, head, rows, start, BLOCK_Q, BLOCK_K), weights, 0.0)
    v = load_tile(value_head, columns, keys, value_token, SIZE, BLOCK_E, UNIT).to(DOT)
    acc = tl.dot(weights.to(DOT), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, total, higher


@triton.jit(do_not_specialize=SIZES + STRIDES)
def attention_fwd_kernel(
    query,  # [Nq, H, SIZE]
    key,  # [Nk, H, SIZE]
    value,  # [Nk, H, SIZE]
    out,  # [Nq, H, SIZE]; SPLIT: float32 [splits, Nq, H, SIZE]
    statistics,  # [H, Nq] base 2 logarithms of the softmax's sums; SPLIT: [splits, H, Nq]
    query_offsets,  # [B + 1]
    key_offsets,  # [B + 1]
    seed,  # [1], or None without DROPOUT
    images: tl.int32,
    all_queries: tl.int64,
    heads: tl.int32,
    splits: tl.int32,
    threshold: tl.int32,
    dropout_scale,
    scale_log2,  # times log2(e), so that exp2, which is what the hardware has, is e^x
    query_token: tl.int64,
    query_head: tl.int64,
    key_token: tl.int64,
    key_head: tl.int64,
    value_token: tl.int64,
    value_head: tl.int64,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program takes a block of an image's queries in one head, and all its keys; SPLIT: a share of them."""
    image, block = find_work(query_offsets, images, tl.program_id(0), BLOCK_Q)
    head, split = tl.program_id(1), tl.program_id(2)
    first_query, queries = span(query_offsets, image)
    first_key, keys = span(key_offsets, image)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_head = head_of(query, first_query, head, query_token, query_head, UNIT)
    k_head = head_of(key, first_key, head, key_token, key_head, UNIT)
    v_head = head_of(value, first_key, head, value_token, value_head, UNIT)
    q = load_tile(q_head, rows, queries, query_token, SIZE, BLOCK_E, UNIT).to(DOT)
    word = tl.load(seed) if DROPOUT else 0

    begin, end = 0, keys
    if SPLIT:
        share = tl.cdiv(tl.cdiv(keys, BLOCK_K), splits) * BLOCK_K
        begin = tl.minimum(split * share, keys)
        end = tl.minimum(begin + share, keys)
    full = begin + (end - begin) // BLOCK_K * BLOCK_K
    acc = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    for start in range(begin, full, BLOCK_K):
        acc, total, highest = attend(
            acc, total, highest, q, q_head, queries, query_token, k_head, v_head, key_token, value_token, start, None,
            scale_log2, word, threshold, image, head, rows, SIZE, BLOCK_E, UNIT, BLOCK_Q, BLOCK_K, DROPOUT, DOT,
            CHUNK, PRECISION,
        )  # fmt: skip
    if full < end:
        acc, total, highest = attend(
            acc, total, highest, q, q_head, queries, query_token, k_head, v_head, key_token, value_token, full, keys,
            scale_log2, word, threshold, image, head, rows, SIZE, BLOCK_E, UNIT, BLOCK_Q, BLOCK_K, DROPOUT, DOT,
            CHUNK, PRECISION,
        )  # fmt: skip

    # Without keys the sum is 0: zeros come out, and -inf as its logarithm.
    acc = acc * tl.where(total == 0.0, 0.0, dropout_scale / total)[:, None]
    part = split.to(tl.int64) * all_queries
    out_head = head_of(out, part + first_query, head, heads * SIZE, SIZE, 1)
    store_tile(out_head, rows, queries, heads * SIZE, acc, SIZE, BLOCK_E, 1)
    place = statistics + (part * heads + head * all_queries + first_query) + rows
    tl.store(place, highest + tl.log2(total), mask=rows < queries)


@triton.jit(do_not_specialize=["all_queries", "heads", "splits"])
def attention_fwd_reduce_kernel(
    parts,  # float32 [splits, Nq, H, SIZE]
    part_statistics,  # [splits, H, Nq]
    out,  # [Nq, H, SIZE]
    statistics,  # [H, Nq]
    all_queries: tl.int64,
    heads: tl.int32,
    splits: tl.int32,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts of a split pass into one, always in the same order. A program takes a block of queries in one head."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    acc = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    first = all_queries * 0
    for split in range(splits):
        part = split * all_queries
        place = part_statistics + (part * heads + head * all_queries) + rows
        logarithm = tl.load(place, mask=rows < all_queries, other=float("-inf"))
        higher = tl.maximum(highest, logarithm)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no keys so far
        rescale, weight = tl.exp2(highest - base), tl.exp2(logarithm - base)
        x = load_tile(
            head_of(parts, part, head, heads * SIZE, SIZE, 1), rows, all_queries, heads * SIZE, SIZE, BLOCK_E, 1
        )
        acc = acc * rescale[:, None] + x * weight[:, None]
        total = total * rescale + weight
        highest = higher
    acc = acc * tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    store_tile(head_of(out, first, head, heads * SIZE, SIZE, 1), rows, all_queries, heads * SIZE, acc, SIZE, BLOCK_E, 1)
    tl.store(statistics + head * all_queries + rows, highest + tl.log2(total), mask=rows < all_queries)
