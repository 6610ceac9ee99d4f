"""Block sizes of the attention kernels: fixed defaults, and what a tuning on this machine found instead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

# Up to as many tokens on a kernel's own side are "short": a decoder's queries.
SHORT = 256
KERNELS = ("forward", "query_gradient", "key_value_gradient")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS_E = (16, 32, 64, 128)


class Kind(NamedTuple):
    """What a choice is made for. Coarse: no length and no batch size asks for a choice, or a compilation, of its own.

    Attributes:
        kernel: of KERNELS.
        block_e: the head size, up to a power of 2.
        dtype: of the tokens.
        dropout: whether there is any.
        short: whether the longest image has at most SHORT tokens on the side that programs are made of.
    """

    kernel: str
    block_e: int
    dtype: torch.dtype
    dropout: bool
    short: bool


class Choice(NamedTuple):
    """Attributes: tokens of a block of queries and of keys; warps of a program; stages of the loop's loads."""

    queries: int
    keys: int
    warps: int
    stages: int


# (kernel, short) to the candidates for 16 bits by the head size up to which they hold: queries, keys, warps, stages.
# The larger the heads, the smaller the tiles whose sums stay in registers.
CANDIDATES: dict[tuple[str, bool], dict[int, list[tuple[int, int, int, int]]]] = {
    ("forward", False): {
        32: [(128, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2)],
        64: [(128, 64, 8, 2), (64, 64, 4, 2)],
        128: [(128, 32, 8, 2), (32, 64, 4, 2)],
    },
    ("forward", True): {128: [(32, 64, 4, 2), (16, 64, 2, 2)]},
    ("query_gradient", False): {
        16: [(64, 64, 4, 2)],
        32: [(64, 64, 4, 2), (128, 64, 8, 2)],
        64: [(64, 32, 4, 2), (64, 64, 8, 2)],
        128: [(32, 32, 4, 2)],
    },
    ("query_gradient", True): {64: [(32, 64, 4, 2), (32, 32, 4, 2)], 128: [(32, 32, 4, 2)]},
    ("key_value_gradient", False): {32: [(64, 64, 4, 2), (64, 32, 4, 2)], 128: [(64, 32, 4, 2), (32, 32, 4, 2)]},
    ("key_value_gradient", True): {32: [(64, 64, 4, 2), (64, 32, 4, 2)], 128: [(64, 32, 4, 2), (32, 32, 4, 2)]},
}
# Of float32 a product takes two parts of each number.
FLOAT32 = [(32, 32, 4, 2)]
FLOAT32_LARGE_HEADS = [(16, 32, 4, 2)]


def candidates(kind: Kind) -> tuple[Choice, ...]:
    """What may be chosen, the default first. The tests hold every one to its resources on sm_80 and sm_90."""
    if kind.dtype == torch.float32:
        large = kind.kernel == "key_value_gradient" and kind.block_e == 128
        return tuple(Choice(*numbers) for numbers in (FLOAT32_LARGE_HEADS if large else FLOAT32))
    by_size = CANDIDATES[kind.kernel, kind.short]
    return tuple(Choice(*numbers) for numbers in by_size[min(size for size in by_size if size >= kind.block_e)])


def kinds() -> Iterator[Kind]:
    """Every kind there is."""
    for kernel in KERNELS:
        for block_e in BLOCKS_E:
            for dtype in DTYPES:
                for dropout in (False, True):
                    for short in (False, True):
                        yield Kind(kernel, block_e, dtype, dropout, short)


_chosen: dict[Kind, Choice] = {}


def choice_for(kind: Kind) -> Choice:
    """The choice that was set, or the default."""
    return _chosen.get(kind) or candidates(kind)[0]


def set_choice(kind: Kind, choice: Choice) -> None:
    """From now on, in this process.

    Raises:
        ValueError: ``choice`` is not among the candidates, which are known to compile.
    """
    if choice not in candidates(kind):
        raise ValueError(
            f"choice must be one of {[tuple(c) for c in candidates(kind)]} for {kind}, got {tuple(choice)}"
        )
    _chosen[kind] = choice


def reset_choices() -> None:
    """Back to the defaults."""
    _chosen.clear()


def save_choices(path: Path | str) -> None:
    """Write the choices that were set, as JSON."""
    rows = [
        {**kind._asdict(), "dtype": str(kind.dtype).removeprefix("torch."), **choice._asdict()}
        for kind, choice in _chosen.items()
    ]
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def load_choices(path: Path | str) -> None:
    """Set the choices that ``save_choices`` wrote.

    Raises:
        ValueError: the file is not one, or has a choice that is not a candidate (of another version).
    """
    try:
        rows = json.loads(Path(path).read_text())
        found = [
            (
                Kind(row["kernel"], row["block_e"], getattr(torch, row["dtype"]), row["dropout"], row["short"]),
                Choice(*(row[field] for field in Choice._fields)),
            )
            for row in rows
        ]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a file of save_choices: {type(error).__name__} {error}") from error
    for kind, choice in found:
        set_choice(kind, choice)
