"""The generator of dropout: known answers, the documented places of its bits, and what share it keeps."""

from __future__ import annotations

import pytest
import torch

from detr_fast.ops import Dropout
from detr_fast.ops.dropout import WORD, attention_keep_mask, check_dropout, keep_mask, philox

# Of Random123's kat_vectors: four words of counter, two of key, four of answer, for philox4x32 with 7 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((WORD,) * 4, (WORD,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def seed_of(key0: int, key1: int) -> torch.Tensor:
    seed = key1 << 32 | key0
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed])


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_known_answers(counter: tuple, key: tuple, answer: tuple) -> None:
    words = philox(seed_of(*key), tuple(torch.tensor([c]) for c in counter))
    assert [hex(int(w)) for w in words] == [hex(a) for a in answer]


def test_every_number_is_where_the_documentation_says() -> None:
    dropout = Dropout.draw(0.5, torch.device("cpu"))
    kept = attention_keep_mask(dropout, 3, 2, 5, 75)
    for head, row, column in [(0, 0, 0), (1, 4, 7), (1, 2, 8), (0, 3, 31), (1, 1, 32), (0, 4, 74), (1, 0, 41)]:
        counter = (column // 32 * 4 + column % 8 // 2, row, head, 3)
        words = philox(dropout.seed, tuple(torch.tensor([c]) for c in counter))
        number = int(words[column % 32 // 8]) >> (16 * (column % 2)) & 0xFFFF
        assert bool(kept[head, row, column]) == (number >= dropout.threshold), (head, row, column)


def test_what_is_kept_does_not_depend_on_what_is_beside_it() -> None:
    dropout = Dropout.draw(0.4, torch.device("cpu"))
    kept = attention_keep_mask(dropout, 7, 3, 20, 100)
    assert torch.equal(attention_keep_mask(dropout, 7, 2, 9, 33), kept[:2, :9, :33])
    assert torch.equal(keep_mask(dropout, 20, 100), attention_keep_mask(dropout, 0, 1, 20, 100)[0])
    other = Dropout(dropout.p, dropout.seed + 1)
    for changed in (attention_keep_mask(dropout, 6, 3, 20, 100), attention_keep_mask(other, 7, 3, 20, 100)):
        assert 0.3 < (kept == changed).float().mean() < 0.7
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[0, 0], kept[0, 1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_the_share_that_is_kept(p: float) -> None:
    dropout = Dropout.draw(p, torch.device("cpu"))
    kept = keep_mask(dropout, 1000, 1000).double()
    # Five deviations of the mean of a million draws, and as many of a row's thousand (one row in 2 million).
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p)) ** 0.5 / 1000
    assert (kept.mean(1) - (1 - p)).abs().max() < 5.5 * (p * (1 - p) / 1000) ** 0.5
    assert (kept.mean(0) - (1 - p)).abs().max() < 5.5 * (p * (1 - p) / 1000) ** 0.5
    neighbours = torch.corrcoef(torch.stack([kept[:, :-1].flatten(), kept[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.005
    assert dropout.scale == pytest.approx(1 / (1 - p), rel=1e-4)


def test_nothing_and_everything_dropped() -> None:
    seed = torch.tensor([5])
    assert keep_mask(Dropout(0.0, seed), 30, 30).all() and Dropout(0.0, seed).scale == 1
    assert not keep_mask(Dropout(1.0, seed), 30, 30).any() and Dropout(1.0, seed).scale == 0


def test_draw_follows_the_default_generator() -> None:
    torch.manual_seed(3)
    first, second = (Dropout.draw(0.1, torch.device("cpu")).seed for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(Dropout.draw(0.1, torch.device("cpu")).seed, first) and not torch.equal(first, second)


def test_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r"dropout.p must be in \[0, 1\], got 1.5"):
        check_dropout(Dropout(1.5, torch.zeros(1, dtype=torch.int64)), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"dropout.seed must be int64 \[1\] on cpu, got torch.float32 \[2\] on cpu"):
        check_dropout(Dropout(0.5, torch.zeros(2)), torch.device("cpu"))
