"""The attention weights themselves, of chosen queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops.attention.reference import weights_of
from detr_fast.ops.attention.types import AttentionInputs, TokenOffsets, check_attention_inputs


def attention_weights(
    query: Tensor,
    key: Tensor,
    query_offsets: TokenOffsets,
    key_offsets: TokenOffsets,
    *,
    queries: Sequence[Tensor] | None = None,
    scale: float | None = None,
) -> list[Tensor]:
    """How much chosen queries attend to each key of their image, without dropout.

    The weights of the other queries are never computed.

    Args:
        query, key, query_offsets, key_offsets, scale: as ``attention`` takes them.
        queries: for each of B images, int64 [M]: which of its queries, counted within the image; None: all of them.

    Returns:
        B tensors [H, M, keys of the image], float32 at least; rows sum to 1.

    Raises:
        ValueError: a shape or dtype is not as above.

    Differentiable. On CUDA it does not wait for the device.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    check_attention_inputs(AttentionInputs(query, key, key, query_offsets, key_offsets, scale, None))
    _check_queries(queries, query_offsets)
    dtype = torch.promote_types(query.dtype, torch.float32)
    of_images = list(query.split(list(query_offsets.lengths)))
    if queries is not None:
        of_images = [q[chosen] for q, chosen in zip(of_images, queries, strict=True)]
    keys = key.split(list(key_offsets.lengths))
    return [weights_of(q.to(dtype), k.to(dtype), scale) for q, k in zip(of_images, keys, strict=True)]


def _check_queries(queries: Sequence[Tensor] | None, query_offsets: TokenOffsets) -> None:
    if queries is None:
        return
    images = len(query_offsets.lengths)
    if len(queries) != images:
        raise ValueError(f"queries must have one tensor for each of {images} images, got {len(queries)}")
    for image, chosen in enumerate(queries):
        if chosen.ndim != 1 or chosen.dtype != torch.int64:
            got = f"{chosen.dtype} {list(chosen.shape)}"
            raise ValueError(f"queries of image {image} must be int64 [M], got {got}")
