"""The attention layer of the transformer, on tokens without padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.models.tokens import TokenLayout
from detr_fast.ops import Dropout, TokenOffsets, attention
from detr_fast.ops.attention.api import OP as ATTENTION

Heads = tuple[Tensor, Tensor, Tensor]  # query [Nq, H, E], key and value [Nk, H, E]


class MultiHeadAttention(nn.Module):
    """Scaled dot product attention with ``torch.nn.MultiheadAttention``'s parameters (Vaswani et al. 2017).

    Projection and attention are apart, so that a projection can serve several layers: ``forward`` takes what is
    projected already.

    Args:
        embed_dim: the model's width D, a multiple of ``num_heads``.
        num_heads: heads H of size E = D / H.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, query_layout: TokenLayout, key_layout: TokenLayout
    ) -> Tensor:
        """Attend.

        Args:
            query: [Nq, H, E]. key, value: [Nk, H, E]. Projected, and of any strides with 1 in the last dimension.
            query_layout, key_layout: whose tokens these are; an image's queries attend to its keys.

        Returns:
            [Nq, D]. The queries of an image without keys get the output projection's bias.
        """
        p = self.dropout if self.training else 0.0
        if key_layout.padding is not None:
            heads = _masked_attention(query, key, value, key_layout.padding, p)
        elif query_layout.offsets is None or key_layout.offsets is None:
            heads = _dense_attention(query, key, value, key_layout.batch, None, p)
        else:
            heads = _attend(query, key, value, query_layout.offsets, key_layout.offsets, p)
        return self.out_proj(heads.flatten(1))

    def project_self(self, x: Tensor, x_pos: Tensor) -> Heads:
        """Self-attention's heads: queries and keys of ``x_pos`` [N, D], the tokens with positions, values of ``x``."""
        # One product of x alone, with the positions' products kept from call to call and added to it, takes as long:
        # 1.21 ms, this 1.20 ms, at 850 tokens on two cores. ``x_pos`` comes for nothing out of the norm before.
        both, one = [2 * self.embed_dim, self.embed_dim]
        weight_qk, weight_v = self.in_proj_weight.split([both, one])
        bias_qk, bias_v = self.in_proj_bias.split([both, one])
        query, key = self.split_heads(F.linear(x_pos, weight_qk, bias_qk)).chunk(2, dim=1)
        return query, key, self.split_heads(F.linear(x, weight_v, bias_v))

    def project_query(self, x_pos: Tensor) -> Tensor:
        """[N, D] tokens with positions to queries [N, H, E]."""
        width = self.embed_dim
        return self.split_heads(F.linear(x_pos, self.in_proj_weight[:width], self.in_proj_bias[:width]))

    def of_equal_values(self, x: Tensor) -> Tensor:
        """What self-attention gives where all tokens have the same value ``x`` [1, D]: [1, D] for each of them.

        Whatever the weights are, their sum is 1. Without dropout only.
        """
        width = self.embed_dim
        return self.out_proj(F.linear(x, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :]))

    def split_heads(self, x: Tensor) -> Tensor:
        """[..., any number of heads * E] to [N, heads, E]."""
        size = self.embed_dim // self.num_heads
        return x.reshape(-1, x.shape[-1] // size, size)


def project_memory(layers: list[MultiHeadAttention], memory: Tensor, memory_pos: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The keys and values [N, H, E] of all layers that attend to one memory, in one product each.

    Args:
        layers: cross-attentions of the same width and number of heads.
        memory: [N, D]. memory_pos: the same with positions.
    """
    width, heads = layers[0].embed_dim, layers[0].num_heads
    keys, values = slice(width, 2 * width), slice(2 * width, 3 * width)

    def project(x: Tensor, rows: slice) -> tuple[Tensor, ...]:
        weight = torch.cat([layer.in_proj_weight[rows] for layer in layers])
        bias = torch.cat([layer.in_proj_bias[rows] for layer in layers])
        return F.linear(x, weight, bias).unflatten(-1, (len(layers), heads, width // heads)).unbind(1)

    return list(zip(project(memory_pos, keys), project(memory, values), strict=True))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: TokenOffsets, key_offsets: TokenOffsets, p: float
) -> Tensor:
    if p == 0:
        return attention(query, key, value, query_offsets, key_offsets)
    dropout = Dropout.draw(p, query.device)
    if torch.compiler.is_compiling() or ATTENTION.choose(None, query, dropout.seed).name != "reference":
        return attention(query, key, value, query_offsets, key_offsets, dropout=dropout)
    # Where there is no kernel, the reference would draw a number for every weight in PyTorch: 6 to 13 times slower than
    # PyTorch's own dropout, image by image.
    query_lengths, key_lengths = (list(offsets.lengths) for offsets in (query_offsets, key_offsets))
    images = zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths), strict=True)
    heads = [
        F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), dropout_p=p)
        for q, k, v in images
    ]
    return torch.cat([x.transpose(0, 1) for x in heads])


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, padding: Tensor, p: float) -> Tensor:
    """Attention on padded tokens, of which those of ``padding`` [B, S] are not attended to."""
    # An image that is all padding has no keys: a row without any would be NaN in some of SDPA's kernels.
    empty = padding.all(1)[:, None, None, None]  # on the device, where it stays
    allowed = ~padding[:, None, None, :] | empty
    heads = _dense_attention(query, key, value, padding.shape[0], allowed, p)
    return heads.unflatten(0, (padding.shape[0], -1)).masked_fill(empty, 0).flatten(0, 1)


def _dense_attention(query: Tensor, key: Tensor, value: Tensor, batch: int, allowed: Tensor | None, p: float) -> Tensor:
    """Attention where every image has as many tokens, [B * length, H, E] each."""
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (query, key, value))  # [B, H, length, E]
    return F.scaled_dot_product_attention(q, k, v, allowed, p).transpose(1, 2).flatten(0, 1)
