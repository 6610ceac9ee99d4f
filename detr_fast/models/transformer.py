"""The encoder-decoder of DETR (Carion et al. 2020, section 3.2 and appendix A.3).

Tensors are batch first: tokens [B, S, D], queries [B, Q, D]. Positional encodings are added to the queries and keys of
every attention layer, never to the values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class MultiHeadAttention(nn.Module):
    """Scaled dot product attention with ``torch.nn.MultiheadAttention``'s parameters (Vaswani et al. 2017).

    Args:
        embed_dim: the model's width D, a multiple of ``num_heads``.
        num_heads: heads H of size D / H.
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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: [B, Lq, D]. key, value: [B, Lk, D].
            key_padding_mask: [B, Lk] bool, True = padding, not attended to; a row must not be all padding.

        Returns:
            [B, Lq, D].
        """
        wq, wk, wv = self.in_proj_weight.chunk(3)
        bq, bk, bv = self.in_proj_bias.chunk(3)
        q, k, v = (
            self._split_heads(F.linear(x, w, b)) for x, w, b in ((query, wq, bq), (key, wk, bk), (value, wv, bv))
        )
        allowed = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, allowed, dropout)  # [B, H, Lq, D / H]
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def attention_weights(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """How much each query attends to each key, without dropout: [B, H, Lq, Lk], rows sum to 1."""
        wq, wk, _ = self.in_proj_weight.chunk(3)
        bq, bk, _ = self.in_proj_bias.chunk(3)
        q, k = self._split_heads(F.linear(query, wq, bq)), self._split_heads(F.linear(key, wk, bk))
        scores = q @ k.transpose(2, 3) / (q.shape[-1] ** 0.5)
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None, :], float("-inf"))
        return scores.softmax(-1)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, length, D / H]


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual and a layer norm."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = _activation(activation)
        self.normalize_before = normalize_before

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """[B, S, D] tokens, [B, S] padding mask, [B, S, D] positions, to [B, S, D]."""
        if self.normalize_before:
            src = src + self.dropout1(self._attend(self.norm1(src), src_key_padding_mask, pos))
            return src + self.dropout2(self._feed_forward(self.norm2(src)))
        src = self.norm1(src + self.dropout1(self._attend(src, src_key_padding_mask, pos)))
        return self.norm2(src + self.dropout2(self._feed_forward(src)))

    def _attend(self, x: Tensor, mask: Tensor | None, pos: Tensor | None) -> Tensor:
        x_pos = _add(x, pos)
        return self.self_attn(x_pos, x_pos, x, key_padding_mask=mask)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerDecoderLayer(nn.Module):
    """Self-attention among queries, attention to the memory, and a feed-forward network."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(d_model, nhead, dropout)
        self.multihead_attn = MultiHeadAttention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = _activation(activation)
        self.normalize_before = normalize_before

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """[B, Q, D] queries, [B, S, D] memory, [B, S] its padding mask, positions of both, to [B, Q, D]."""
        key = _add(memory, pos)
        if self.normalize_before:
            tgt = tgt + self.dropout1(self._attend_self(self.norm1(tgt), query_pos))
            query = _add(self.norm2(tgt), query_pos)
            tgt = tgt + self.dropout2(self.multihead_attn(query, key, memory, memory_key_padding_mask))
            return tgt + self.dropout3(self._feed_forward(self.norm3(tgt)))
        tgt = self.norm1(tgt + self.dropout1(self._attend_self(tgt, query_pos)))
        query = _add(tgt, query_pos)
        tgt = self.norm2(tgt + self.dropout2(self.multihead_attn(query, key, memory, memory_key_padding_mask)))
        return self.norm3(tgt + self.dropout3(self._feed_forward(tgt)))

    def _attend_self(self, x: Tensor, query_pos: Tensor | None) -> Tensor:
        x_pos = _add(x, query_pos)
        return self.self_attn(x_pos, x_pos, x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerEncoder(nn.Module):
    """Encoder layers one after the other, then ``norm`` where there is one."""

    def __init__(self, layers: list[TransformerEncoderLayer], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """[B, S, D] tokens to [B, S, D] memory."""
        for layer in self.layers:
            src = layer(src, src_key_padding_mask, pos)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(nn.Module):
    """Decoder layers one after the other; every output goes through the same ``norm``."""

    def __init__(
        self, layers: list[TransformerDecoderLayer], norm: nn.Module, return_intermediate: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.return_intermediate = return_intermediate

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """[B, Q, D] queries to [L, B, Q, D], every layer's output, or [1, B, Q, D], the last one's."""
        outputs = []
        for layer in self.layers:
            tgt = layer(tgt, memory, memory_key_padding_mask, pos, query_pos)
            outputs.append(tgt)
        return self.norm(torch.stack(outputs if self.return_intermediate else outputs[-1:]))


class Transformer(nn.Module):
    """Encoder over the image's tokens, decoder from object queries to object embeddings.

    Args:
        d_model: width D.
        nhead: attention heads.
        num_encoder_layers, num_decoder_layers: layers of each.
        dim_feedforward: inner width of the feed-forward networks.
        dropout: after every attention and feed-forward network, on attention weights, and inside the latter.
        activation: "relu" or "gelu".
        normalize_before: layer norm before each block (pre-norm), not after its residual (post-norm).
        return_intermediate_dec: return every decoder layer's output (auxiliary losses need them).
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
        return_intermediate_dec: bool = False,
    ) -> None:
        super().__init__()
        arguments = (d_model, nhead, dim_feedforward, dropout, activation, normalize_before)
        encoder_norm = nn.LayerNorm(d_model) if normalize_before else None
        encoder_layers = [TransformerEncoderLayer(*arguments) for _ in range(num_encoder_layers)]
        self.encoder = TransformerEncoder(encoder_layers, encoder_norm)
        decoder_layers = [TransformerDecoderLayer(*arguments) for _ in range(num_decoder_layers)]
        self.decoder = TransformerDecoder(decoder_layers, nn.LayerNorm(d_model), return_intermediate_dec)
        self.d_model = d_model
        self.nhead = nhead
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a feature map into object embeddings.

        Args:
            src: [B, D, h, w] projected features.
            mask: [B, h, w] bool, True = padding.
            query_embed: [Q, D] the learned object queries, used as the queries' positions in every decoder layer.
            pos_embed: [B, D, h, w] positions of the tokens.

        Returns:
            hs [L, B, Q, D] (L = 1 without ``return_intermediate_dec``) and the encoder's memory [B, D, h, w].
        """
        tokens = src.flatten(2).transpose(1, 2)  # [B, S, D]
        pos = pos_embed.flatten(2).transpose(1, 2)
        query_pos = query_embed.expand(len(src), -1, -1)  # [B, Q, D]
        padding = mask.flatten(1)
        memory = self.encoder(tokens, padding, pos)
        hs = self.decoder(torch.zeros_like(query_pos), memory, padding, pos, query_pos)
        return hs, memory.transpose(1, 2).reshape(src.shape)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def _add(x: Tensor, position: Tensor | None) -> Tensor:
    return x if position is None else x + position
