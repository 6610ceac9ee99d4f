"""The encoder-decoder of DETR (Carion et al. 2020, section 3.2 and appendix A.3).

The tokens of all images lie one behind the other, without padding: [N, D]; queries are [B, Q, D]. Positions are added
to the queries and keys of every attention layer, never to the values: beside tokens ``x`` there is ``x_pos``, the same
tokens with their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr_fast.data.batch import Size
from detr_fast.models.attention import MultiHeadAttention, project_memory
from detr_fast.models.feed_forward import activation_of, feed_forward, linear_layers
from detr_fast.models.tokens import TokenLayout
from detr_fast.ops import Dropout, add_layer_norm


class Memory(NamedTuple):
    """What a decoder layer attends to: keys and values [N, H, E] of the tokens of ``layout``."""

    key: Tensor
    value: Tensor
    layout: TokenLayout


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
        self.linear1, self.linear2 = linear_layers(d_model, dim_feedforward, activation)
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = activation_of(activation)
        self.normalize_before = normalize_before

    def forward(self, x: Tensor, x_pos: Tensor, *, pos: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Tokens [N, D] and the same with their positions ``pos``, before the layer and after it."""
        if self.normalize_before:
            y = self.norm1(x)
            x = x + self.dropout1(self._attend(y, y + pos, layout))
            x = x + self.dropout2(_feed_forward(self, self.norm2(x)))
            return x, x + pos
        x, _ = _residual_norm(self.norm1, self.dropout1, self._attend(x, x_pos, layout), x)
        return _residual_norm(self.norm2, self.dropout2, _feed_forward(self, x), x, pos)

    def _attend(self, x: Tensor, x_pos: Tensor, layout: TokenLayout) -> Tensor:
        return self.self_attn(*self.self_attn.project_self(x, x_pos), layout, layout)


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
        self.linear1, self.linear2 = linear_layers(d_model, dim_feedforward, activation)
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = activation_of(activation)
        self.normalize_before = normalize_before

    def forward(
        self, x: Tensor, x_pos: Tensor, *, query_pos: Tensor, layout: TokenLayout, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, Q, D] and the same with their positions ``query_pos`` [Q, D], before the layer and after it."""
        return self.attend_memory(*self.attend_self(x, x_pos, query_pos, layout), query_pos, layout, memory)

    def attend_self(self, x: Tensor, x_pos: Tensor, query_pos: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The first third of the layer; arguments and result as for the layer."""
        if self.normalize_before:
            y = self.norm1(x)
            x = x + self.dropout1(self._attend_self(y, y + query_pos, layout))
            return x, x
        return _residual_norm(self.norm1, self.dropout1, self._attend_self(x, x_pos, layout), x, query_pos)

    def attend_self_of_zeros(self, query_pos: Tensor) -> tuple[Tensor, Tensor]:
        """``attend_self`` without dropout where x is zero: the same [1, 1, D] for all, and with positions [1, Q, D]."""
        zeros = query_pos.new_zeros(1, 1, query_pos.shape[-1])
        if self.normalize_before:
            x = self.self_attn.of_equal_values(self.norm1(zeros))
        else:
            x = self.norm1(self.self_attn.of_equal_values(zeros))
        return x, x + query_pos

    def attend_memory(
        self, x: Tensor, x_pos: Tensor, query_pos: Tensor, layout: TokenLayout, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """The rest of the layer."""
        if self.normalize_before:
            x = x + self.dropout2(self._attend_memory(self.norm2(x) + query_pos, layout, memory))
            x = x + self.dropout3(_feed_forward(self, self.norm3(x)))
            return x, x
        x, _ = _residual_norm(self.norm2, self.dropout2, self._attend_memory(x_pos, layout, memory), x)
        return _residual_norm(self.norm3, self.dropout3, _feed_forward(self, x), x, query_pos)

    def _attend_self(self, x: Tensor, x_pos: Tensor, layout: TokenLayout) -> Tensor:
        return self.self_attn(*self.self_attn.project_self(x, x_pos), layout, layout).view(x.shape)

    def _attend_memory(self, x_pos: Tensor, layout: TokenLayout, memory: Memory) -> Tensor:
        query = self.multihead_attn.project_query(x_pos)
        return self.multihead_attn(query, memory.key, memory.value, layout, memory.layout).view(x_pos.shape)


class TransformerEncoder(nn.Module):
    """Encoder layers one after the other, then ``norm`` where there is one."""

    def __init__(self, layers: list[TransformerEncoderLayer], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.activation_checkpointing = False

    def forward(self, x: Tensor, pos: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Tokens [N, D] and their positions to the memory [N, D], without and with positions."""
        x_pos = x + pos
        for layer in self.layers:
            run = partial(layer, pos=pos, layout=layout)
            x, x_pos = _checkpointed(run, x, x_pos) if _checkpoints(self) else run(x, x_pos)
        if self.norm is None:
            return x, x_pos
        x = self.norm(x)
        return x, x + pos


class TransformerDecoder(nn.Module):
    """Decoder layers one after the other; every output goes through the same ``norm``."""

    def __init__(
        self, layers: list[TransformerDecoderLayer], norm: nn.Module, return_intermediate: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.return_intermediate = return_intermediate
        self.activation_checkpointing = False

    def forward(self, memory: Tensor, memory_pos: Tensor, query_pos: Tensor, layout: TokenLayout) -> Tensor:
        """Decode object queries, which start as zeros.

        Args:
            memory, memory_pos: [N, D] tokens of ``layout``, without and with positions.
            query_pos: [Q, D].

        Returns:
            [L, B, Q, D], every layer's output, or [1, B, Q, D], the last one's.
        """
        batch = layout.batch
        queries = TokenLayout.full(batch, (1, len(query_pos)), query_pos.device)
        layers: list[TransformerDecoderLayer] = list(self.layers)  # type: ignore[arg-type]
        memories = self.project_memory(memory, memory_pos)
        x = torch.zeros_like(query_pos).expand(batch, -1, -1)
        x_pos = query_pos.expand(batch, -1, -1)
        outputs = []
        for index, (layer, (key, value)) in enumerate(zip(layers, memories, strict=True)):
            run = partial(layer, query_pos=query_pos, layout=queries, memory=Memory(key, value, layout))
            if index == 0 and not self.training:
                # All queries start with the same value: there is nothing to choose from. Dropout would break this.
                x, x_pos = (y.expand(batch, len(query_pos), -1) for y in layer.attend_self_of_zeros(query_pos))
                x, x_pos = layer.attend_memory(x, x_pos, query_pos, queries, Memory(key, value, layout))
            else:
                x, x_pos = _checkpointed(run, x, x_pos) if _checkpoints(self) else run(x, x_pos)
            outputs.append(x)
        return self.norm(torch.stack(outputs if self.return_intermediate else outputs[-1:]))

    def project_memory(self, memory: Tensor, memory_pos: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values [N, H, E] of the memory [N, D], without and with positions."""
        layers: list[TransformerDecoderLayer] = list(self.layers)  # type: ignore[arg-type]
        return project_memory([layer.multihead_attn for layer in layers], memory, memory_pos)


class Transformer(nn.Module):
    """Encoder over the image's tokens, decoder from object queries to object embeddings.

    Padding is left out before the first layer: nothing is computed on it, and nothing depends on it.

    Args:
        d_model: width D.
        nhead: attention heads.
        num_encoder_layers, num_decoder_layers: layers of each.
        dim_feedforward: inner width of the feed-forward networks.
        dropout: after every attention and feed-forward network, on attention weights, and inside the latter.
        activation: "relu", "gelu" or "glu".
        normalize_before: layer norm before each block (pre-norm), not after its residual (post-norm).
        return_intermediate_dec: return every decoder layer's output (auxiliary losses need them).
        activation_checkpointing: in training keep only the layers' inputs, and compute the layers again in the backward
            pass: less memory, more time.
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
        activation_checkpointing: bool = False,
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
        self.encoder.activation_checkpointing = self.decoder.activation_checkpointing = activation_checkpointing
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None,
        query_embed: Tensor,
        pos_embed: Tensor,
        sizes: Sequence[Size] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Turn a feature map into object embeddings.

        Args:
            src: [B, D, h, w] projected features.
            mask: [B, h, w] bool, True = padding; None: there is none.
            query_embed: [Q, D] the learned object queries, used as the queries' positions in every decoder layer.
            pos_embed: [B, D, h, w] positions of the tokens.
            sizes: the valid (height, width) of each map, as ``mask`` has them. Without them a mask on the CPU is read;
                on another device, where that would wait, the result is the same but padding is computed on.

        Returns:
            hs [L, B, Q, D] (L = 1 without ``return_intermediate_dec``) and the encoder's memory [B, D, h, w], which
            is zero where there is padding.
        """
        height, width = src.shape[-2:]
        if mask is None:
            layout = TokenLayout.full(src.shape[0], (height, width), src.device)  # len() of a symbol is a number
        else:
            layout = TokenLayout.of(mask, sizes)
        tokens = layout.pack(src)
        if torch.is_autocast_enabled(src.device.type):
            tokens = tokens.float()  # as a layer norm's result is then: residuals are summed in float32
        hs, memory = self.run_layers(tokens, layout.pack(pos_embed), query_embed, layout)
        return hs, layout.unpack(memory)

    def run_layers(self, x: Tensor, pos: Tensor, query_pos: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Tokens [N, D] of ``layout`` and their positions to hs and the memory [N, D]."""
        memory, memory_pos = self.encoder(x, pos, layout)
        return self.decoder(memory, memory_pos, query_pos, layout), memory


def _residual_norm(
    norm: nn.LayerNorm, dropout: nn.Dropout, branch: Tensor, x: Tensor, pos: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """norm(x + dropout(branch)), and the same with positions; x twice without any."""
    drawn = Dropout.draw(dropout.p, x.device) if dropout.training and dropout.p > 0 else None
    y = add_layer_norm(branch, x, norm.weight, norm.bias, eps=norm.eps, dropout=drawn, pos=pos)
    return y if isinstance(y, tuple) else (y, y)


def _feed_forward(layer: TransformerEncoderLayer | TransformerDecoderLayer, x: Tensor) -> Tensor:
    dropout = layer.dropout.p if layer.dropout.training else 0.0
    return feed_forward(x, layer.linear1, layer.linear2, layer.activation, dropout)


def _checkpoints(part: TransformerEncoder | TransformerDecoder) -> bool:
    return part.activation_checkpointing and part.training and torch.is_grad_enabled()


def _checkpointed(run: Callable[..., tuple[Tensor, Tensor]], x: Tensor, x_pos: Tensor) -> tuple[Tensor, Tensor]:
    return checkpoint(run, x, x_pos, use_reentrant=False)
