"""Attention in plain PyTorch, image by image."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops.attention.types import AttentionInputs
from detr_fast.ops.dropout import attention_keep_mask


def attention_reference(inputs: AttentionInputs) -> Tensor:
    query, key, value, query_offsets, key_offsets, scale, dropout = inputs
    dtype = torch.promote_types(query.dtype, torch.float32)
    images = zip(
        query.to(dtype).split(list(query_offsets.lengths)),
        key.to(dtype).split(list(key_offsets.lengths)),
        value.to(dtype).split(list(key_offsets.lengths)),
        strict=True,
    )
    outputs = [query[:0].to(dtype)]
    for image, (q, k, v) in enumerate(images):
        weights = weights_of(q, k, scale)
        if dropout is not None:
            weights = weights * attention_keep_mask(dropout, image, *weights.shape) * dropout.scale
        outputs.append(torch.einsum("hqk,khe->qhe", weights, v))  # zeros where there are no keys
    return torch.cat(outputs).to(query.dtype)


def weights_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Of one image's queries [Lq, H, E] to its keys [Lk, H, E]: [H, Lq, Lk]. Vaswani et al. 2017, equation 1."""
    return (torch.einsum("qhe,khe->hqk", q, k) * scale).softmax(-1)
