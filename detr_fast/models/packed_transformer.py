"""A transformer for inference on a CPU: linear layers whose weights are packed once, with the ReLU inside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from detr_fast.models.attention import Heads, MultiHeadAttention
from detr_fast.models.feed_forward import ACTIVATIONS
from detr_fast.models.packed_resnet import applied
from detr_fast.models.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from detr_fast.ops import PackedConv, conv, pack_conv


class PackedLinear(nn.Module):
    """A linear layer, and the ReLU after it where there is one, as a 1x1 convolution. It has no parameters.

    Args:
        weight: [K, D].
        bias: [K].
        relu: whether negative results become zeros.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> None:
        super().__init__()
        self.packed: PackedConv = pack_conv(weight[:, :, None, None], bias)
        self.out_features, self.in_features = weight.shape
        self.relu = relu

    @staticmethod
    def of(linear: nn.Linear, *, relu: bool = False) -> PackedLinear:
        """What ``linear`` computes."""
        return PackedLinear(linear.weight, linear.bias, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., K]."""
        tokens = x.reshape(-1, self.in_features, 1, 1)  # each of them a map of one pixel
        return conv(tokens, self.packed, relu=self.relu).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        self.packed = applied(fn, self.packed)
        return self


class PackedSelfAttention(MultiHeadAttention):
    """A ``MultiHeadAttention`` among tokens of one kind, which stays as it is."""

    def __init__(self, layer: MultiHeadAttention) -> None:
        _start_as(self, layer)
        width, weight, bias = layer.embed_dim, layer.in_proj_weight, layer.in_proj_bias
        self.query_and_key = PackedLinear(weight[: 2 * width], bias[: 2 * width])
        self.value = PackedLinear(weight[2 * width :], bias[2 * width :])

    def project_self(self, x: Tensor, x_pos: Tensor) -> Heads:
        query, key = self.split_heads(self.query_and_key(x_pos)).chunk(2, dim=1)
        return query, key, self.split_heads(self.value(x))

    def of_equal_values(self, x: Tensor) -> Tensor:
        return self.out_proj(self.value(x))


class PackedCrossAttention(MultiHeadAttention):
    """A ``MultiHeadAttention``, which stays as it is, without the projections of the memory: see ``PackedDecoder``."""

    def __init__(self, layer: MultiHeadAttention) -> None:
        _start_as(self, layer)
        width = layer.embed_dim
        self.query = PackedLinear(layer.in_proj_weight[:width], layer.in_proj_bias[:width])

    def project_query(self, x_pos: Tensor) -> Tensor:
        return self.split_heads(self.query(x_pos))


def _start_as(new: MultiHeadAttention, layer: MultiHeadAttention) -> None:
    nn.Module.__init__(new)
    new.embed_dim, new.num_heads, new.dropout = layer.embed_dim, layer.num_heads, layer.dropout
    new.out_proj = PackedLinear.of(layer.out_proj)  # type: ignore[assignment]


class PackedDecoder(TransformerDecoder):
    """A decoder that projects the memory for all of its layers at once; its layers become packed ones."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        layers: list[TransformerDecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
        super().__init__(layers, decoder.norm, decoder.return_intermediate)
        self.num_heads = layers[0].multihead_attn.num_heads
        parts = [
            zip(layer.multihead_attn.in_proj_weight.chunk(3), layer.multihead_attn.in_proj_bias.chunk(3), strict=True)
            for layer in layers
        ]
        _, self.keys, self.values = (
            PackedLinear(torch.cat([weight for weight, _ in part]), torch.cat([bias for _, bias in part]))
            for part in zip(*parts, strict=True)
        )
        for layer in layers:
            layer.self_attn = PackedSelfAttention(layer.self_attn)
            layer.multihead_attn = PackedCrossAttention(layer.multihead_attn)
            _pack_feed_forward(layer)

    def project_memory(self, memory: Tensor, memory_pos: Tensor) -> list[tuple[Tensor, Tensor]]:
        shape = (len(self.layers), self.num_heads, -1)
        keys, values = self.keys(memory_pos).unflatten(-1, shape), self.values(memory).unflatten(-1, shape)
        return list(zip(keys.unbind(1), values.unbind(1), strict=True))


def packed_weights(transformer: Transformer) -> list[Tensor]:
    """The weights of which ``pack_transformer`` leaves nothing in the transformer; none where it does nothing."""
    weight = next(transformer.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return []
    layers = [*transformer.encoder.layers, *transformer.decoder.layers]
    return [weight for layer in layers for weight in layer.parameters() if weight.ndim == 2]


def pack_transformer(transformer: Transformer) -> None:
    """Pack the linear layers of a transformer in eval mode, if it is in float32 on a CPU."""
    if not packed_weights(transformer):
        return
    for layer in transformer.encoder.layers:
        assert isinstance(layer, TransformerEncoderLayer)
        layer.self_attn = PackedSelfAttention(layer.self_attn)
        _pack_feed_forward(layer)
    transformer.decoder = PackedDecoder(transformer.decoder)
    transformer.eval()


def _pack_feed_forward(layer: TransformerEncoderLayer | TransformerDecoderLayer) -> None:
    relu = layer.activation is ACTIVATIONS["relu"]
    layer.linear1 = PackedLinear.of(layer.linear1, relu=relu)  # type: ignore[assignment]
    layer.linear2 = PackedLinear.of(layer.linear2)  # type: ignore[assignment]
    if relu:
        layer.activation = _as_it_is


def _as_it_is(x: Tensor) -> Tensor:
    return x
