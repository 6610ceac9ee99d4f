"""The backward kernels of attention: one for the queries' gradient, one for those of keys and values; no atomics.

Each computes the weights again from the saved logarithms, and dropout's mask from the seed (Dao 2023, algorithm 2).
Dropout's scale is a factor of the sums, not of each weight: delta is divided by it instead.
"""

# Triton takes annotations of a kernel for the types to compile it for, so that most arguments have none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from detr_fast.ops._triton_dropout import keep_tile
from detr_fast.ops.attention.triton_forward import SIZES, STRIDES
from detr_fast.ops.attention.triton_tiles import find_work, head_of, load_tile, product, span, store_tile

GRAD_STRIDES = ["grad_token", "grad_head"]


@triton.jit
def add_to_dquery(
    dq,
    q,
    grad,
    query_head,
    grad_head,
    queries,
    query_token,
    grad_token,
    logarithm,
    delta,
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
    """What a block of keys adds. ``keys`` is how many the image has, None where the block is full."""
    columns = start + tl.arange(0, BLOCK_K)
    k = load_tile(key_head, columns, keys, key_token, SIZE, BLOCK_E, UNIT).to(DOT)
    v = load_tile(value_head, columns, keys, value_token, SIZE, BLOCK_E, UNIT).to(DOT)
    scores = product(
        q, query_head, rows, queries, query_token, k, key_head, columns, keys, key_token,
        SIZE, BLOCK_E, UNIT, CHUNK, PRECISION,
    )  # fmt: skip
    weights = tl.exp2(scores * scale_log2 - logarithm[:, None])
    dweights = product(
        grad, grad_head, rows, queries, grad_token, v, value_head, columns, keys, value_token,
        SIZE, BLOCK_E, UNIT, CHUNK, PRECISION,
    )  # fmt: skip
    if DROPOUT:
        keep = keep_tile(seed, threshold, image, head, rows, start, BLOCK_Q, BLOCK_K)
        dweights = tl.where(keep, dweights, 0.0)
    dscores = weights * (dweights - delta[:, None])
    if keys is not None:
        dscores = tl.where(columns[None, :] < keys, dscores, 0.0)
    return tl.dot(dscores.to(DOT), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES + STRIDES + GRAD_STRIDES)
def attention_bwd_query_kernel(
    query,  # [Nq, H, SIZE]
    key,  # [Nk, H, SIZE]
    value,  # [Nk, H, SIZE]
    out,  # [Nq, H, SIZE], contiguous
    grad,  # [Nq, H, SIZE], of the output
    statistics,  # [H, Nq] of the forward pass
    delta,  # [H, Nq], written: the products of output and gradient, times the share that dropout keeps
    dquery,  # [Nq, H, SIZE], written; SPLIT: float32 [splits, Nq, H, SIZE]
    query_offsets,  # [B + 1]
    key_offsets,  # [B + 1]
    seed,  # [1], or None without DROPOUT
    images: tl.int32,
    all_queries: tl.int64,
    heads: tl.int32,
    splits: tl.int32,
    threshold: tl.int32,
    kept_share,
    dscale,  # of scores, times dropout's
    scale_log2,
    query_token: tl.int64,
    query_head: tl.int64,
    key_token: tl.int64,
    key_head: tl.int64,
    value_token: tl.int64,
    value_head: tl.int64,
    grad_token: tl.int64,
    grad_head: tl.int64,
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
    g_head = head_of(grad, first_query, head, grad_token, grad_head, UNIT)
    o_head = head_of(out, first_query, head, heads * SIZE, SIZE, 1)
    q = load_tile(q_head, rows, queries, query_token, SIZE, BLOCK_E, UNIT).to(DOT)
    g = load_tile(g_head, rows, queries, grad_token, SIZE, BLOCK_E, UNIT).to(DOT)
    o = load_tile(o_head, rows, queries, heads * SIZE, SIZE, BLOCK_E, 1)
    products = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1) * kept_share
    place = (head * all_queries + first_query) + rows
    tl.store(delta + place, products, mask=rows < queries)  # the same from every split
    logarithm = tl.load(statistics + place, mask=rows < queries, other=0.0)
    word = tl.load(seed) if DROPOUT else 0

    begin, end = 0, keys
    if SPLIT:
        share = tl.cdiv(tl.cdiv(keys, BLOCK_K), splits) * BLOCK_K
        begin = tl.minimum(split * share, keys)
        end = tl.minimum(begin + share, keys)
    full = begin + (end - begin) // BLOCK_K * BLOCK_K
    dq = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    for start in range(begin, full, BLOCK_K):
        dq = add_to_dquery(
            dq, q, g, q_head, g_head, queries, query_token, grad_token, logarithm, products, k_head, v_head, key_token,
            value_token, start, None, scale_log2, word, threshold, image, head, rows, SIZE, BLOCK_E, UNIT, BLOCK_Q,
            BLOCK_K, DROPOUT, DOT, CHUNK, PRECISION,
        )  # fmt: skip
    if full < end:
        dq = add_to_dquery(
            dq, q, g, q_head, g_head, queries, query_token, grad_token, logarithm, products, k_head, v_head, key_token,
            value_token, full, keys, scale_log2, word, threshold, image, head, rows, SIZE, BLOCK_E, UNIT, BLOCK_Q,
            BLOCK_K, DROPOUT, DOT, CHUNK, PRECISION,
        )  # fmt: skip
    dq_head = head_of(dquery, split.to(tl.int64) * all_queries + first_query, head, heads * SIZE, SIZE, 1)
    store_tile(dq_head, rows, queries, heads * SIZE, dq * dscale, SIZE, BLOCK_E, 1)


@triton.jit
def add_to_dkey_and_dvalue(
    dk,
    dv,
    k,
    v,
    key_head,
    value_head,
    columns,
    keys,
    key_token,
    value_token,
    query_head,
    grad_head,
    query_token,
    grad_token,
    statistics,
    delta,
    start,
    queries,
    scale_log2,
    seed,
    threshold,
    image,
    head,
    first_key,
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
    """What a block of queries adds. ``queries`` is how many the image has, None where the block is full.

    Tiles are [queries, keys] here, too, though the products that follow take them transposed, by way of shared memory:
    dropout's mask then lies in registers as it is computed. The other way around it is the mask that goes there, and a
    score takes 24 instructions instead of 19 (sm_90, head size 32).
    """
    rows = start + tl.arange(0, BLOCK_Q)
    q = load_tile(query_head, rows, queries, query_token, SIZE, BLOCK_E, UNIT).to(DOT)
    g = load_tile(grad_head, rows, queries, grad_token, SIZE, BLOCK_E, UNIT).to(DOT)
    if queries is None:
        logarithm, products = tl.load(statistics + rows), tl.load(delta + rows)
    else:  # no weight beyond the queries: e^(score - inf)
        logarithm = tl.load(statistics + rows, mask=rows < queries, other=float("inf"))
        products = tl.load(delta + rows, mask=rows < queries, other=0.0)
    scores = product(
        q, query_head, rows, queries, query_token, k, key_head, columns, keys, key_token,
        SIZE, BLOCK_E, UNIT, CHUNK, PRECISION,
    )  # fmt: skip
    weights = tl.exp2(scores * scale_log2 - logarithm[:, None])
    dweights = product(
        g, grad_head, rows, queries, grad_token, v, value_head, columns, keys, value_token,
        SIZE, BLOCK_E, UNIT, CHUNK, PRECISION,
    )  # fmt: skip
    kept = weights
    if DROPOUT:
        keep = keep_tile(seed, threshold, image, head, rows, first_key, BLOCK_Q, BLOCK_K)
        kept = tl.where(keep, weights, 0.0)
        dweights = tl.where(keep, dweights, 0.0)
    dv = tl.dot(tl.trans(kept.to(DOT)), g, dv, input_precision=PRECISION)
    dscores = weights * (dweights - products[:, None])
    dk = tl.dot(tl.trans(dscores.to(DOT)), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES + STRIDES + GRAD_STRIDES + ["all_keys"])
def attention_bwd_key_value_kernel(
    query,  # [Nq, H, SIZE]
    key,  # [Nk, H, SIZE]
    value,  # [Nk, H, SIZE]
    grad,  # [Nq, H, SIZE], of the output
    statistics,  # [H, Nq] of the forward pass
    delta,  # [H, Nq] of attention_bwd_query_kernel
    dkey,  # [Nk, H, SIZE], written
    dvalue,  # [Nk, H, SIZE], written
    query_offsets,  # [B + 1]
    key_offsets,  # [B + 1]
    seed,  # [1], or None without DROPOUT
    images: tl.int32,
    all_queries: tl.int64,
    heads: tl.int32,
    threshold: tl.int32,
    dropout_scale,
    dscale,  # of scores, times dropout's
    scale_log2,
    query_token: tl.int64,
    query_head: tl.int64,
    key_token: tl.int64,
    key_head: tl.int64,
    value_token: tl.int64,
    value_head: tl.int64,
    grad_token: tl.int64,
    grad_head: tl.int64,
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
    """A program takes a block of an image's keys in one head, and all its queries."""
    image, block = find_work(key_offsets, images, tl.program_id(0), BLOCK_K)
    head = tl.program_id(1)
    first_query, queries = span(query_offsets, image)
    first_key, keys = span(key_offsets, image)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    q_head = head_of(query, first_query, head, query_token, query_head, UNIT)
    k_head = head_of(key, first_key, head, key_token, key_head, UNIT)
    v_head = head_of(value, first_key, head, value_token, value_head, UNIT)
    g_head = head_of(grad, first_query, head, grad_token, grad_head, UNIT)
    k = load_tile(k_head, columns, keys, key_token, SIZE, BLOCK_E, UNIT).to(DOT)
    v = load_tile(v_head, columns, keys, value_token, SIZE, BLOCK_E, UNIT).to(DOT)
    of_head = head * all_queries + first_query
    word = tl.load(seed) if DROPOUT else 0

    full = queries // BLOCK_Q * BLOCK_Q
    dk = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for start in range(0, full, BLOCK_Q):
        dk, dv = add_to_dkey_and_dvalue(
            dk, dv, k, v, k_head, v_head, columns, keys, key_token, value_token, q_head, g_head, query_token,
            grad_token, statistics + of_head, delta + of_head, start, None, scale_log2, word, threshold, image, head,
            block * BLOCK_K, SIZE, BLOCK_E, UNIT, BLOCK_Q, BLOCK_K, DROPOUT, DOT, CHUNK, PRECISION,
        )  # fmt: skip
    if full < queries:
        dk, dv = add_to_dkey_and_dvalue(
            dk, dv, k, v, k_head, v_head, columns, keys, key_token, value_token, q_head, g_head, query_token,
            grad_token, statistics + of_head, delta + of_head, full, queries, scale_log2, word, threshold, image, head,
            block * BLOCK_K, SIZE, BLOCK_E, UNIT, BLOCK_Q, BLOCK_K, DROPOUT, DOT, CHUNK, PRECISION,
        )  # fmt: skip
    dk_head = head_of(dkey, first_key, head, heads * SIZE, SIZE, 1)
    dv_head = head_of(dvalue, first_key, head, heads * SIZE, SIZE, 1)
    store_tile(dk_head, columns, keys, heads * SIZE, dk * dscale, SIZE, BLOCK_E, 1)
    store_tile(dv_head, columns, keys, heads * SIZE, dv * dropout_scale, SIZE, BLOCK_E, 1)
