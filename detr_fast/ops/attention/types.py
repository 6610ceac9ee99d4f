"""What ``attention`` takes: tokens without padding, and where each image's begin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.ops.dropout import Dropout, check_dropout


class TokenOffsets(NamedTuple):
    """Where the tokens of B images lie, one image behind the other, without padding. Built once for a batch.

    Attributes:
        lengths: B counts of tokens, on the host.
        offsets: [B + 1] int32: an image's tokens are rows offsets[b] to offsets[b + 1].
    """

    lengths: tuple[int, ...]
    offsets: Tensor

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str) -> TokenOffsets:
        """Of B counts. Does not wait for the device."""
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        if torch.device(device).type == "cuda" and not torch.compiler.is_compiling():
            offsets = offsets.pin_memory()  # a copy from memory that is not pinned waits for the device
        return TokenOffsets(tuple(lengths), offsets.to(device, non_blocking=True))

    @staticmethod
    def equal(batch: int, length: int, device: torch.device | str) -> TokenOffsets:
        """Of ``batch`` images of the same length; nothing is copied, so that it can be captured and exported."""
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return TokenOffsets((length,) * batch, offsets)

    @property
    def max_length(self) -> int:
        """The longest image's tokens; 0 without images."""
        return max(self.lengths, default=0)

    @property
    def total(self) -> int:
        """The tokens of all images."""
        return sum(self.lengths)


class AttentionInputs(NamedTuple):
    """A call of ``attention``, checked, as its implementations take it."""

    query: Tensor  # [Nq, H, E], like the next two of any strides with 1 in the last dimension
    key: Tensor  # [Nk, H, E]
    value: Tensor  # [Nk, H, E]
    query_offsets: TokenOffsets
    key_offsets: TokenOffsets
    scale: float
    dropout: Dropout | None


def check_attention_inputs(inputs: AttentionInputs) -> None:
    """Raise ValueError where shapes or dtypes are not as ``attention`` says. Reads metadata only."""
    query, key, value, query_offsets, key_offsets, _, dropout = inputs
    if query.ndim != 3 or not query.is_floating_point():
        raise ValueError(f"query must be float [Nq, H, E], got {query.dtype} {list(query.shape)}")
    heads, size = query.shape[1:]
    if heads == 0 or size == 0:
        raise ValueError(f"query must have heads and a head size, got {list(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.ndim != 3 or list(tensor.shape[1:]) != [heads, size]:
            raise ValueError(f"{name} must be [Nk, {heads}, {size}], got {list(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            wanted, got = f"{query.dtype} on {query.device}", f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be {wanted}, as the query is, got {got}")
    if len(key) != len(value):
        raise ValueError(f"key and value must be of the same tokens, got {len(key)} and {len(value)}")
    check_offsets("query", query, query_offsets)
    check_offsets("key", key, key_offsets)
    if len(query_offsets.lengths) != len(key_offsets.lengths):
        counts = f"{len(query_offsets.lengths)} and {len(key_offsets.lengths)}"
        raise ValueError(f"query_offsets and key_offsets must be of the same images, got {counts}")
    check_dropout(dropout, query.device)


def check_offsets(name: str, tokens: Tensor, offsets: TokenOffsets) -> None:
    """Raise ValueError where offsets are not those of the tokens called ``name``."""
    lengths, starts = offsets
    if any(length < 0 for length in lengths):
        raise ValueError(f"{name}_offsets.lengths must not be negative, got {list(lengths)}")
    if sum(lengths) != len(tokens):
        raise ValueError(f"{name}_offsets must be of the {len(tokens)} tokens of {name}, got {sum(lengths)}")
    if list(starts.shape) != [len(lengths) + 1] or starts.dtype != torch.int32 or starts.device != tokens.device:
        got = f"{starts.dtype} {list(starts.shape)} on {starts.device}"
        raise ValueError(f"{name}_offsets.offsets must be int32 [{len(lengths) + 1}] on {tokens.device}, got {got}")
