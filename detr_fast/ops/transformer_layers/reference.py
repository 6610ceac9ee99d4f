"""A transformer's layers in plain PyTorch (Vaswani et al. 2017; Carion et al. 2020, appendix A.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.attention import TokenOffsets
from detr_fast.ops.attention.reference import attention_reference
from detr_fast.ops.attention.types import AttentionInputs
from detr_fast.ops.conv import PackedConv
from detr_fast.ops.transformer_layers.types import DecoderLayer, EncoderLayer, Norm, TransformerInputs


def transformer_layers_reference(inputs: TransformerInputs) -> tuple[Tensor, Tensor]:
    x, pos, query_pos, layers, offsets, every_layer = inputs
    heads = layers.num_heads
    for layer in layers.encoder:
        x = _norm(layer.norm1, x + _attend_self(layer, x, x + pos, offsets, heads))
        x = _norm(layer.norm2, x + _feed_forward(layer, x))
    batch, queries = len(offsets.lengths), len(query_pos)
    of_queries = TokenOffsets.equal(batch, queries, x.device)
    keys = _linear(layers.keys, x + pos).chunk(len(layers.decoder), dim=1)
    values = _linear(layers.values, x).chunk(len(layers.decoder), dim=1)
    query_pos = query_pos.repeat(batch, 1)
    y, outputs = torch.zeros_like(query_pos), []
    for own, key, value in zip(layers.decoder, keys, values, strict=True):
        y = _norm(own.norm1, y + _attend_self(own, y, y + query_pos, of_queries, heads))
        attended = _attend(_linear(own.query, y + query_pos), key, value, of_queries, offsets, heads)
        y = _norm(own.norm2, y + _linear(own.out_of_memory, attended))
        y = _norm(own.norm3, y + _feed_forward(own, y))
        outputs.append(_norm(layers.norm, y))
    return torch.stack(outputs if every_layer else outputs[-1:]).unflatten(1, (batch, queries)), x


def _attend_self(
    layer: EncoderLayer | DecoderLayer, x: Tensor, x_pos: Tensor, offsets: TokenOffsets, heads: int
) -> Tensor:
    query, key = _linear(layer.query_and_key, x_pos).chunk(2, dim=1)
    return _linear(layer.out, _attend(query, key, _linear(layer.value, x), offsets, offsets, heads))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: TokenOffsets, key_offsets: TokenOffsets, heads: int
) -> Tensor:
    query, key, value = (x.unflatten(1, (heads, -1)) for x in (query, key, value))
    inputs = AttentionInputs(query, key, value, query_offsets, key_offsets, query.shape[2] ** -0.5, None)
    return attention_reference(inputs).flatten(1)


def _feed_forward(layer: EncoderLayer | DecoderLayer, x: Tensor) -> Tensor:
    return _linear(layer.linear2, F.relu(_linear(layer.linear1, x)))


def _linear(packed: PackedConv, x: Tensor) -> Tensor:
    return F.linear(x, packed.weight[:, :, 0, 0], packed.bias)


def _norm(norm: Norm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
