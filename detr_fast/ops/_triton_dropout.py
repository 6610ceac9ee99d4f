"""Dropout's mask in Triton: the bits of ``detr_fast.ops.dropout``, whose documentation says where they are."""

# Triton takes annotations of a kernel for the types to compile it for.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from detr_fast.ops import dropout
from detr_fast.ops.dropout import Dropout

ROUNDS = tl.constexpr(dropout.ROUNDS)


@triton.jit
def keep_tile(seed, threshold, image, head, rows, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile are kept: bool [ROWS, COLUMNS].

    ``rows`` [ROWS] are any; the columns are those from ``first_column``, and both that and COLUMNS are multiples of 32.
    ``threshold``: of ``word_threshold``.
    """
    # Row, head and image on one side and the call on the other enter as vectors, so that the first two rounds and a
    # part of the third are done for vectors, not for the tile.
    call = first_column // 8 + tl.arange(0, COLUMNS // 8)
    w0, w1, w2, w3 = tl.philox(seed, call[None, :], rows[:, None], head, image, ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, calls, 2, 2], in the order w0 w1 w2 w3
    words = tl.permute(words.reshape(ROWS, COLUMNS // 32, 4, 4), 0, 1, 3, 2)  # ..., word, call of the group
    # The upper 16 bits decide whatever the lower are: compared so, the upper half needs no shift and the lower no mask.
    halves = tl.join(words << 16, words).reshape(ROWS, COLUMNS)
    return halves >= threshold.to(tl.uint32, bitcast=True)


def word_threshold(dropout: Dropout | None) -> int:
    """What ``keep_tile`` compares with: the threshold in the upper half of an int32.

    A threshold of 65536, which drops everything, is given as 65535: the scale, 0, drops what is left.
    """
    word = 0 if dropout is None else min(dropout.threshold, 65535) << 16
    return word if word < 2**31 else word - 2**32
