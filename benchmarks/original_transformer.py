"""The original DETR's transformer re-created from its description: ``nn.MultiheadAttention`` called as it calls it.

Every attention materialises its weights and returns their mean, padding goes through every layer, and each layer
projects the memory for itself. Parameters have the original's names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """What encoder and decoder layers share: the feed-forward network, the norms, the dropouts."""

    def __init__(self, width: int, inner: int, dropout: float, attentions: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        for number in range(1, attentions + 2):
            self.add_module(f"norm{number}", nn.LayerNorm(width))
            self.add_module(f"dropout{number}", nn.Dropout(dropout))

    def add(self, number: int, x: Tensor, branch: Tensor) -> Tensor:
        """The residual of block ``number``."""
        return self.get_submodule(f"norm{number}")(x + self.get_submodule(f"dropout{number}")(branch))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Two linear layers with ReLU and dropout between them."""
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class EncoderLayer(Block):
    """Self-attention over all tokens of the padded map, sequence first."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float, need_weights: bool) -> None:
        super().__init__(width, inner, dropout, attentions=1)
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.need_weights = need_weights
        self.weights: Tensor | None = None

    def forward(self, x: Tensor, padding: Tensor, pos: Tensor) -> Tensor:
        """[S, B, D] tokens, [B, S] padding."""
        query = x + pos
        more = {"key_padding_mask": padding, "need_weights": self.need_weights}
        branch, self.weights = self.self_attn(query, query, x, **more)
        x = self.add(1, x, branch)
        return self.add(2, x, self.feed_forward(x))


class DecoderLayer(Block):
    """Self-attention of the queries, attention to the memory."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float, need_weights: bool) -> None:
        super().__init__(width, inner, dropout, attentions=2)
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.need_weights = need_weights
        self.weights: Tensor | None = None

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor, pos: Tensor, query_pos: Tensor) -> Tensor:
        """[Q, B, D] queries, [S, B, D] memory, [B, S] padding."""
        query = x + query_pos
        x = self.add(1, x, self.self_attn(query, query, x, need_weights=self.need_weights)[0])
        more = {"key_padding_mask": padding, "need_weights": self.need_weights}
        branch, self.weights = self.multihead_attn(x + query_pos, memory + pos, memory, **more)
        x = self.add(2, x, branch)
        return self.add(3, x, self.feed_forward(x))


class Layers(nn.Module):
    """A stack of layers, and the decoder's norm."""

    def __init__(self, layers: list[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm


class OriginalTransformer(nn.Module):
    """Post-norm, with every decoder layer's output.

    ``need_weights=False`` leaves out the mean attention weights, which the original computes and never reads.
    """

    def __init__(
        self,
        width: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        inner: int = 2048,
        dropout: float = 0.1,
        need_weights: bool = True,
    ) -> None:
        super().__init__()
        arguments = (width, heads, inner, dropout, need_weights)
        self.encoder = Layers([EncoderLayer(*arguments) for _ in range(encoder_layers)])
        self.decoder = Layers([DecoderLayer(*arguments) for _ in range(decoder_layers)], nn.LayerNorm(width))

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor]:
        """[B, D, h, w] features, [B, h, w] mask, [Q, D] queries, [B, D, h, w] positions to hs and memory."""
        memory, pos = (x.flatten(2).permute(2, 0, 1) for x in (src, pos_embed))  # [S, B, D]
        query_pos = query_embed[:, None].repeat(1, len(src), 1)
        padding, x, outputs = mask.flatten(1), torch.zeros_like(query_pos), []
        for layer in self.encoder.layers:
            memory = layer(memory, padding, pos)
        for layer in self.decoder.layers:
            x = layer(x, memory, padding, pos, query_pos)
            outputs.append(self.decoder.norm(x))
        return torch.stack(outputs).transpose(1, 2), memory.permute(1, 2, 0).reshape(src.shape)
