"""A transformer for inference on a CPU: weights that are packed once, and all layers in one call where that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.models.attention import Heads, MultiHeadAttention
from detr_fast.models.detr import Detr
from detr_fast.models.feed_forward import ACTIVATIONS
from detr_fast.models.packed_resnet import applied
from detr_fast.models.tokens import TokenLayout
from detr_fast.models.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from detr_fast.ops import (
    DecoderLayer,
    EncoderLayer,
    Norm,
    PackedConv,
    TransformerLayers,
    conv,
    pack_conv,
    transformer_layers,
)
from detr_fast.ops.transformer_layers.api import fits_native


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


class PackedProjection(PackedLinear):
    """The same for every pixel of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, h, w] to [B, K, h, w]."""
        return conv(x, self.packed, relu=self.relu)


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


class PackedTransformer(Transformer):
    """A transformer whose layers run in one call, where the kernel for that takes them as they are."""

    def run_layers(self, x: Tensor, pos: Tensor, query_pos: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        if layout.offsets is not None and layout.padding is None and self._is_usual() and not _has_hooks(self):
            layers = self._layers()
            if fits_native(x, layers):
                every = self.decoder.return_intermediate
                return transformer_layers(x, pos, query_pos, layers, layout.offsets, every_layer=every)
        return super().run_layers(x, pos, query_pos, layout)

    def _is_usual(self) -> bool:
        """Norms after residuals, of one kind, and ReLU."""
        layers = [*self.encoder.layers, *self.decoder.layers]
        norms = {m.eps if type(m) is nn.LayerNorm else None for m in _norms(self)}
        usual = all(layer.activation is _as_it_is and not layer.normalize_before for layer in layers)
        return usual and self.encoder.norm is None and len(norms) == 1 and None not in norms

    def _layers(self) -> TransformerLayers:
        decoder = self.decoder
        assert isinstance(decoder, PackedDecoder)
        encoder_layers = tuple(_packed_encoder_layer(layer) for layer in self.encoder.layers)
        decoder_layers = tuple(_packed_decoder_layer(layer) for layer in decoder.layers)
        keys, values = decoder.keys.packed, decoder.values.packed
        return TransformerLayers(decoder.num_heads, encoder_layers, decoder_layers, keys, values, _norm(decoder.norm))


def _has_hooks(transformer: Transformer) -> bool:
    """Whether somebody looks on inside, which has to go layer by layer then."""
    parts = (*transformer.encoder.modules(), *transformer.decoder.modules())
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def _norms(transformer: Transformer) -> list[nn.Module]:
    layers = [*transformer.encoder.layers, *transformer.decoder.layers]
    return [transformer.decoder.norm, *(m for layer in layers for name, m in layer.named_children() if "norm" in name)]


def _norm(norm: nn.Module) -> Norm:
    assert isinstance(norm, nn.LayerNorm)
    return Norm(norm.weight, norm.bias, norm.eps)


def _packed_encoder_layer(layer: Any) -> EncoderLayer:
    own = layer.self_attn
    return EncoderLayer(
        own.query_and_key.packed,
        own.value.packed,
        own.out_proj.packed,
        _norm(layer.norm1),
        layer.linear1.packed,
        layer.linear2.packed,
        _norm(layer.norm2),
    )


def _packed_decoder_layer(layer: Any) -> DecoderLayer:
    own, cross = layer.self_attn, layer.multihead_attn
    return DecoderLayer(
        own.query_and_key.packed,
        own.value.packed,
        own.out_proj.packed,
        _norm(layer.norm1),
        cross.query.packed,
        cross.out_proj.packed,
        _norm(layer.norm2),
        layer.linear1.packed,
        layer.linear2.packed,
        _norm(layer.norm3),
    )


def pack_heads(detr: Detr) -> None:
    """Pack the linear layers before and after the transformer, if they are in float32 on a CPU."""
    projection, classes, boxes = detr.input_proj, detr.class_embed, detr.bbox_embed
    if _can_pack(projection.weight):
        detr.input_proj = PackedProjection(projection.weight[:, :, 0, 0], projection.bias)  # type: ignore[assignment]
        detr.class_embed = PackedLinear.of(classes)  # type: ignore[assignment]
        linears: list[nn.Linear] = list(boxes.layers)  # type: ignore[arg-type]
        layers = [PackedLinear.of(linear, relu=linear is not linears[-1]) for linear in linears]
        detr.bbox_embed = nn.Sequential(*layers)  # type: ignore[assignment]


def _can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def packed_weights(transformer: Transformer) -> list[Tensor]:
    """The weights of which ``pack_transformer`` leaves nothing in the transformer; none where it does nothing."""
    if not _can_pack(next(transformer.parameters())):
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
    transformer.__class__ = PackedTransformer  # so that whoever holds it has the packed one
    transformer.eval()


def _pack_feed_forward(layer: TransformerEncoderLayer | TransformerDecoderLayer) -> None:
    relu = layer.activation is ACTIVATIONS["relu"]
    layer.linear1 = PackedLinear.of(layer.linear1, relu=relu)  # type: ignore[assignment]
    layer.linear2 = PackedLinear.of(layer.linear2)  # type: ignore[assignment]
    if relu:
        layer.activation = _as_it_is


def _as_it_is(x: Tensor) -> Tensor:
    return x
