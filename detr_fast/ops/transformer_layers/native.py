"""A transformer's layers by csrc/cpu/transformer_layers.cpp."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.conv import PackedConv
from detr_fast.ops.conv.native import panels_of
from detr_fast.ops.transformer_layers.types import DecoderLayer, EncoderLayer, Norm, TransformerInputs


def why_not(tokens: Tensor, inner: Tensor) -> str | None:
    """``tokens`` are [N, H, E], ``inner`` is linear1's bias [F]."""
    if tokens.device.type != "cpu":
        return f"there is no native code for {tokens.device.type} devices"
    if tokens.dtype != torch.float32:
        return f"its native code is for float32, and the tokens are {tokens.dtype}"
    _, heads, size = tokens.shape
    if size % 8 or size > 128:
        return f"its native code is for head sizes that are multiples of 8 up to 128, not {size}"
    if heads * size % 64 or len(inner) % 64:
        return f"its native code is for widths that are multiples of 64, not {heads * size} and {len(inner)}"
    return _native.why_not(tokens.device)


def transformer_layers_native(inputs: TransformerInputs) -> tuple[Tensor, Tensor]:
    _, _, query_pos, layers, offsets, every_layer = inputs
    x, pos, query_pos = (tensor.detach().contiguous() for tensor in inputs[:3])
    width, batch = x.shape[1], len(offsets.lengths)
    memory, memory_pos = torch.empty_like(x), torch.empty_like(x)
    hs = torch.empty(len(layers.decoder) if every_layer else 1, batch, len(query_pos), width)
    sizes = width, layers.decoder[0].linear1.shape[0], layers.num_heads, len(query_pos)
    call = list(offsets.lengths), sizes, layers.norm.eps, torch.get_num_threads()
    native = _native.module()
    native.encoder_layers_cpu(
        *call,
        [list(_addresses(layer)) for layer in layers.encoder],
        x.data_ptr(),
        pos.data_ptr(),
        memory.data_ptr(),
        memory_pos.data_ptr(),
    )
    native.decoder_layers_cpu(
        *call,
        [[*_addresses(layer), *_of_memory(inputs, place)] for place, layer in enumerate(layers.decoder)],
        memory.data_ptr(),
        memory_pos.data_ptr(),
        query_pos.data_ptr(),
        list(_pair(layers.norm)),
        not every_layer,
        hs.data_ptr(),
    )
    return hs, memory


def _addresses(layer: EncoderLayer | DecoderLayer) -> Iterator[int]:
    """Of the weight and bias of every part, in the order of the structs in csrc/cpu/transformer_layers.h."""
    for part in layer:
        yield from _pair(part)


def _pair(part: PackedConv | Norm) -> tuple[int, int]:
    weight = part.weight if isinstance(part, Norm) else panels_of(part)
    assert part.bias is not None
    return weight.data_ptr(), part.bias.data_ptr()


def _of_memory(inputs: TransformerInputs, layer: int) -> Iterator[int]:
    """Of a decoder layer's part of the keys' and values' weights: whole panels, one behind the other."""
    width, size = inputs.x.shape[1], inputs.x.element_size()
    for packed in (inputs.layers.keys, inputs.layers.values):
        weight, bias = _pair(packed)
        yield weight + layer * width * width * size
        yield bias + layer * width * size
