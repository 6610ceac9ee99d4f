"""Numbers that differ from call to call as arguments of a Triton kernel: counts of targets, and where layers lie.

So there is no copy to the device to wait for, and a CUDA graph captures them.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

# Triton compiles anew for an argument in a tuple that is 1, a multiple of 16, or below 2^31. So a number travels as a
# word that is none of these: 2 (number + 2^60) + 1.
BIAS = tl.constexpr(1 << 60)


@triton.jit
def pick(words, index, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton would compile for the types
    """The number at a place of a tuple of words."""
    word = words[0]
    for i in tl.static_range(1, LENGTH):
        word = tl.where(index == i, words[i], word)
    return (word >> 1) - BIAS


def as_words(numbers: Sequence[int], length: int) -> tuple[int, ...]:
    """The first ``length`` numbers as the words that ``pick`` reads; zeros where there are fewer."""
    padded = [*numbers[:length], *[0] * (length - len(numbers))]
    return tuple(2 * (number + BIAS.value) + 1 for number in padded)


def distances(layers: list[Tensor] | None, first: int, length: int) -> tuple[int, ...]:
    """How far layers lie from layer 0, in elements, as words; from layer ``first`` on.

    Addresses are subtracted: the tensors of the layers need not be of one allocation.
    """
    if layers is None:
        return as_words([], length)
    base, size = layers[0].data_ptr(), layers[0].element_size()
    return as_words([(x.data_ptr() - base) // size for x in layers[first:]], length)
