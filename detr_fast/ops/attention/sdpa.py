"""Attention by PyTorch's own ``scaled_dot_product_attention``: a call for each run of images of equal lengths."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.attention.types import AttentionInputs


def why_not(query: Tensor, seed: Tensor | None = None) -> str | None:
    if seed is not None:
        return "SDPA draws its dropout from torch's generator, so that its backward could not be given the seed's mask"
    return None


def attention_sdpa(inputs: AttentionInputs) -> Tensor:
    query, key, value, query_offsets, key_offsets, scale, _ = inputs
    lengths = list(zip(query_offsets.lengths, key_offsets.lengths, strict=True))
    runs = [(pair, len(list(images))) for pair, images in groupby(lengths)]
    query_sizes = [images * queries for (queries, _), images in runs]
    key_sizes = [images * keys for (_, keys), images in runs]
    parts = zip(runs, query.split(query_sizes), key.split(key_sizes), value.split(key_sizes), strict=True)
    outputs = [_run(q, k, v, images, scale) for (_, images), q, k, v in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat([query[:0], *outputs])


def _run(q: Tensor, k: Tensor, v: Tensor, images: int, scale: float) -> Tensor:
    """Of ``images`` images of the same lengths, tokens packed."""
    if len(k) == 0:  # a sum of no values: zeros that are differentiable
        return torch.einsum("qhk,khe->qhe", q.new_empty(*q.shape[:2], 0), v)
    if len(q) == 0:
        return q
    q, k, v = (x.unflatten(0, (images, -1)).transpose(1, 2) for x in (q, k, v))  # [images, H, length, E]
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)
