"""Dropout by a counter-based generator: which elements are kept follows from a seed and their place alone.

So a kernel decides element by element, its backward decides the same again, nothing is stored, and every
implementation, ``keep_mask`` below among them, keeps the same elements bit for bit.

The generator is Philox-4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Its key
is the seed, low word first. Its counter is four words:

    word 0: (column // 32) * 4 + column % 8 // 2
    word 1: row
    word 2: head
    word 3: image

In attention row and column are a query and a key, counted within the image; an elementwise dropout has head = image =
0. A call yields four words w0..w3, that is eight numbers of 16 bits. The number of column c is the low (c even) or high
(c odd) half of word (c % 32) // 8. An element is kept where its number is at least ``threshold``.

In this order a row's eight columns 8i to 8i + 7 of a group of 32 are the words wi of four calls that follow each other,
as they lie in little-endian memory: so for a vector unit; and they are those of one row that one thread holds of a
matrix product's tile: so for tensor cores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


class Dropout(NamedTuple):
    """Drop elements with probability ``p`` (to 16 bits), and scale those that are kept.

    Attributes:
        p: in [0, 1].
        seed: [1] int64, on the device of what is dropped. One seed, one mask: draw one for each use.
    """

    p: float
    seed: Tensor

    @staticmethod
    def draw(p: float, device: torch.device) -> Dropout:
        """With a seed from torch's default generator of that device. Does not wait for it."""
        return Dropout(p, torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device))

    @property
    def threshold(self) -> int:
        """In [0, 65536]: an element is kept where its 16 bits are at least this."""
        return threshold_of(self.p)

    @property
    def scale(self) -> float:
        """What an element that is kept is multiplied with; 0 where none is."""
        return scale_of(self.p)


def threshold_of(p: float) -> int:
    """``Dropout.threshold`` of a probability."""
    return round(p * 65536)


def scale_of(p: float) -> float:
    """``Dropout.scale`` of a probability."""
    kept = 65536 - threshold_of(p)
    return 65536 / kept if kept else 0.0


def check_dropout(dropout: Dropout | None, device: torch.device) -> None:
    """Raise ValueError where a Dropout is not as its docstring says. Reads metadata only."""
    if dropout is None:
        return
    if not 0 <= dropout.p <= 1:
        raise ValueError(f"dropout.p must be in [0, 1], got {dropout.p}")
    seed = dropout.seed
    if list(seed.shape) != [1] or seed.dtype != torch.int64 or seed.device != device:
        got = f"{seed.dtype} {list(seed.shape)} on {seed.device}"
        raise ValueError(f"dropout.seed must be int64 [1] on {device}, got {got}")


def keep_mask(dropout: Dropout, rows: int, columns: int) -> Tensor:
    """What an elementwise dropout of [rows, columns] keeps: bool, True = kept."""
    return attention_keep_mask(dropout, 0, 1, rows, columns)[0]


def attention_keep_mask(dropout: Dropout, image: int, heads: int, queries: int, keys: int) -> Tensor:
    """What is kept of an image's attention weights: bool [heads, queries, keys], True = kept."""

    def count(size: int) -> Tensor:
        return torch.arange(size, device=dropout.seed.device)

    groups = (keys + 31) // 32
    head, query, call = count(heads)[:, None, None], count(queries)[:, None], count(groups * 4)
    words = philox(dropout.seed, (call, query, head, torch.full_like(call, image)))
    numbers = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    numbers = numbers.view(heads, queries, groups, 4, 4, 2).transpose(3, 4)  # ..., word, call of the group, half
    return numbers.flatten(2)[..., :keys] >= dropout.threshold


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four words of every counter; words are int64 in [0, 2^32)."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + KEY_STEPS[0]) & WORD, (key1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a * b, in two halves of b because int64 does not hold 64 bits without a sign."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
