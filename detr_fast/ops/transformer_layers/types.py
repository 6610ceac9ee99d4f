"""What ``transformer_layers`` takes: the weights of all layers, as ``pack_conv`` packs them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from detr_fast.ops.attention import TokenOffsets
from detr_fast.ops.conv import PackedConv


class Norm(NamedTuple):
    """A layer norm's weight and bias [D], and what is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


class EncoderLayer(NamedTuple):
    """Self-attention and a feed-forward network of width F, each with a residual and then a norm.

    Linear layers [D] to [K] are 1x1 convolutions with a bias, of the shapes (K, D, 1, 1).

    Attributes:
        query_and_key: [D] to [2 D]. value, out: [D] to [D].
        linear1: [D] to [F], before the ReLU. linear2: [F] to [D].
    """

    query_and_key: PackedConv
    value: PackedConv
    out: PackedConv
    norm1: Norm
    linear1: PackedConv
    linear2: PackedConv
    norm2: Norm


class DecoderLayer(NamedTuple):
    """The same with attention to the memory in between; its keys and values are in ``TransformerLayers``.

    Attributes:
        query, out_of_memory: [D] to [D].
    """

    query_and_key: PackedConv
    value: PackedConv
    out: PackedConv
    norm1: Norm
    query: PackedConv
    out_of_memory: PackedConv
    norm2: Norm
    linear1: PackedConv
    linear2: PackedConv
    norm3: Norm


class TransformerLayers(NamedTuple):
    """A transformer whose norms come after the residuals and whose activation is ReLU.

    Attributes:
        num_heads: of every attention.
        encoder: any number of layers. decoder: L > 0 layers.
        keys, values: [D] to [L D], the memory's of all decoder layers.
        norm: of the decoder's outputs.
    """

    num_heads: int
    encoder: tuple[EncoderLayer, ...]
    decoder: tuple[DecoderLayer, ...]
    keys: PackedConv
    values: PackedConv
    norm: Norm


class TransformerInputs(NamedTuple):
    """A call of ``transformer_layers``, checked, as its implementations take it."""

    x: Tensor
    pos: Tensor
    query_pos: Tensor
    layers: TransformerLayers
    offsets: TokenOffsets
    every_layer: bool
