"""Attention at DETR's sizes, with the padding of real images: the ways there are, against the original's.

Contestants that take a padded batch get one, [B, H, S, E] with a mask, as DETR has it; those that take packed tokens
get these. The head size is 32, 8 heads. "training" is a forward and a backward pass with dropout 0.1; a contestant
without dropout is left out of it. What cannot run here is skipped with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import where
from benchmarks.harness import Contest, Contestant
from benchmarks.shapes import DILATED_MAP, MIXED_MAPS, ONE_MAP, MapShape
from detr_fast.ops import Dropout, TokenOffsets, attention
from detr_fast.ops.attention.api import OP

Race = Callable[[str, str, Callable[[], Contest]], None]
Run = Callable[[float], Tensor]
HEADS, SIZE, DROPOUT = 8, 32, 0.1
DEVICE = str(where.device())
SDPA = {
    "sdpa-math": SDPBackend.MATH,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
OURS = ("native", "triton", "sdpa", "reference")
CONTESTANTS = ("original", *SDPA, "varlen", "flex", *OURS)


@dataclass
class Batch:
    """The same tokens, padded and packed; ``leaves`` are the packed ones, the padded are made of them."""

    leaves: tuple[Tensor, Tensor, Tensor]  # query [Nq, H, E], key and value [Nk, H, E]
    query_offsets: TokenOffsets
    key_offsets: TokenOffsets
    grad: Tensor  # [Nq, H, E]

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[B, H, Lq, E], twice [B, H, S, E], and [B, 1, 1, S] bool, True = a token; None where nothing is padded."""
        lengths = self.query_offsets.lengths, self.key_offsets.lengths, self.key_offsets.lengths
        query, key, value = (
            torch.nn.utils.rnn.pad_sequence(x.split(list(n)), batch_first=True).transpose(1, 2)
            for x, n in zip(self.leaves, lengths, strict=True)
        )
        if len(set(self.key_offsets.lengths)) == 1:
            return query, key, value, None
        counts = torch.tensor(self.key_offsets.lengths, device=query.device)
        valid = torch.arange(key.shape[2], device=query.device) < counts[:, None]
        return query, key, value, valid[:, None, None]

    def packed(self, padded: Tensor) -> Tensor:
        """[B, H, Lq, E] to [Nq, H, E]."""
        images = zip(padded.transpose(1, 2), self.query_offsets.lengths, strict=True)
        return torch.cat([x[:length] for x, length in images])


def batch(shape: MapShape, cross: bool) -> Batch:
    """Self-attention of the tokens, or the queries' attention to them."""
    torch.manual_seed(0)
    tokens = TokenOffsets.of([h * w for h, w in shape.cells], DEVICE)
    queries = TokenOffsets.of([shape.num_queries] * len(shape.sizes), DEVICE) if cross else tokens
    query, grad = (torch.randn(queries.total, HEADS, SIZE, device=DEVICE) for _ in range(2))
    key, value = (torch.randn(tokens.total, HEADS, SIZE, device=DEVICE) for _ in range(2))
    return Batch((query, key, value), queries, tokens, grad)


def original(b: Batch, p: float) -> Tensor:
    """What ``nn.MultiheadAttention`` does where the weights are asked for: all of them in memory, and their mean."""
    query, key, value, valid = b.padded()
    scores = (query * SIZE**-0.5) @ key.transpose(2, 3)
    weights = F.dropout((scores if valid is None else scores.masked_fill(~valid, float("-inf"))).softmax(-1), p)
    weights.mean(1)
    return b.packed(weights @ value)


def sdpa(b: Batch, p: float, backend: SDPBackend) -> Tensor:
    """PyTorch's own, one backend forced."""
    query, key, value, valid = b.padded()
    with sdpa_kernel(backend):
        return b.packed(F.scaled_dot_product_attention(query, key, value, valid, p))


def varlen(b: Batch, p: float) -> Tensor:
    """``torch.nn.attention.varlen``, of newer releases of PyTorch; without dropout."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = b.query_offsets.max_length, b.key_offsets.max_length
    return varlen_attn(*b.leaves, b.query_offsets.offsets, b.key_offsets.offsets, *lengths)


def flex(b: Batch, p: float) -> Tensor:
    """FlexAttention, compiled, on packed tokens with a mask of documents; without dropout."""
    from torch.nn.attention.flex_attention import create_block_mask

    def images(offsets: TokenOffsets) -> Tensor:
        counts = torch.tensor(offsets.lengths, device=DEVICE)
        return torch.arange(len(counts), device=DEVICE).repeat_interleave(counts, output_size=offsets.total)

    of_query, of_key = images(b.query_offsets), images(b.key_offsets)

    def same_image(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return of_query[query] == of_key[key]

    mask = create_block_mask(same_image, None, None, len(of_query), len(of_key), device=DEVICE)
    query, key, value = (x.transpose(0, 1)[None] for x in b.leaves)
    return compiled_flex()(query, key, value, block_mask=mask)[0].transpose(0, 1)


COMPILED: list[Callable[..., Tensor]] = []


def compiled_flex() -> Callable[..., Tensor]:
    """Compiled once."""
    from torch.nn.attention.flex_attention import flex_attention

    if not COMPILED:
        COMPILED.append(torch.compile(flex_attention, dynamic=True))
    return COMPILED[0]


def ours(b: Batch, p: float, backend: str) -> Tensor:
    """The op."""
    dropout = Dropout.draw(p, b.grad.device) if p > 0 else None
    return attention(*b.leaves, b.query_offsets, b.key_offsets, dropout=dropout, backend=backend)


RUNS: dict[str, Callable[[Batch, float], Tensor]] = {
    "original": original,
    **{name: partial(sdpa, backend=backend) for name, backend in SDPA.items()},
    "varlen": varlen,
    "flex": flex,
    **{name: partial(ours, backend=name) for name in OURS if name in {i.name for i in OP.implementations}},
}
WITHOUT_DROPOUT = ("varlen", "flex", "sdpa")
# What the reference's training step may have on a CPU, where a dilated map's 11 million pairs take it 7 s.
MOST_PAIRS = 10_000_000


def why_not(name: str, b: Batch, p: float) -> str | None:
    """Why a contestant cannot run here, or None."""
    if name not in RUNS:
        return "there is no such implementation"
    if p > 0 and name in WITHOUT_DROPOUT:
        return "it has no dropout"
    if name == "reference" and DEVICE == "cpu" and p > 0 and pairs(b) > MOST_PAIRS:
        return "a call takes many seconds"
    if name == "flex" and DEVICE == "cpu" and p > 0:
        return "it has no backward on the CPU"
    try:
        step(RUNS[name], b, p)
    except Exception as error:  # whatever stops it is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return None


def step(run: Callable[[Batch, float], Tensor], b: Batch, p: float) -> Tensor:
    """The output [Nq, H, E], or with dropout, in training, the gradient of the values [Nk, H, E]."""
    if p == 0:
        with torch.inference_mode():
            return run(b, p)
    leaves = tuple(x.detach().requires_grad_() for x in b.leaves)
    out = run(Batch(leaves, b.query_offsets, b.key_offsets, b.grad), p)
    return torch.autograd.grad(out, leaves, b.grad)[2]


def pairs(b: Batch) -> int:
    """Of a query and a key of its image."""
    return sum(q * k for q, k in zip(b.query_offsets.lengths, b.key_offsets.lengths, strict=True))


def multiplications(b: Batch) -> Contestant:
    """Those of both products, in a single one of square matrices, where a machine is quickest."""
    side = round((2 * HEADS * SIZE * pairs(b)) ** (1 / 3))
    matrix = torch.randn(side, side, device=DEVICE)
    return Contestant("floor: multiplications", lambda: matrix @ matrix)


def contest(b: Batch, p: float, names: Sequence[str] = CONTESTANTS) -> Contest:
    """Everybody who can run, checked against float64."""
    double = Batch(tuple(x.double() for x in b.leaves), b.query_offsets, b.key_offsets, b.grad.double())  # type: ignore[arg-type]
    leaves = tuple(x.requires_grad_() for x in double.leaves)
    out = original(double, 0.0)
    expected = (torch.autograd.grad(out, leaves, double.grad)[2] if p > 0 else out.detach()).float()

    def check(found: Tensor) -> None:
        if p == 0:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        # Masks differ, so that only the mean over them can be equal.
        cosine = F.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.8, f"{cosine=}"

    reasons = {name: why_not(name, b, p) for name in names}
    return Contest(
        [Contestant(name, partial(step, RUNS[name], b, p)) for name, why in reasons.items() if why is None],
        check,
        DEVICE,
        floors=[multiplications(b)] if p == 0 else [],
        skipped={name: why for name, why in reasons.items() if why is not None},
    )


CASES = {
    "encoder one": (ONE_MAP, False),
    "encoder mixed-4": (MIXED_MAPS, False),
    "encoder dilated-one": (DILATED_MAP, False),
    "cross one": (ONE_MAP, True),
    "cross mixed-4": (MIXED_MAPS, True),
}
LARGE = ("encoder mixed-4", "encoder dilated-one")
cases = pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.large] * (c in LARGE)) for c in CASES])
contestants = pytest.mark.parametrize("contestant", CONTESTANTS)


@contestants
@cases
def test_inference(race: Race, case: str, contestant: str) -> None:
    race(f"attention inference {case}", contestant, lambda: contest(batch(*CASES[case]), 0.0))


@contestants
@cases
def test_training(race: Race, case: str, contestant: str) -> None:
    race(f"attention training {case}", contestant, lambda: contest(batch(*CASES[case]), DROPOUT))
