"""The packed transformer of optimised copies: what the plain one computes, with every option and any padding."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_optimize import resnet_detr
from test_transformer import SIZES, inputs, randomised, transformer
from torch import Tensor, nn

from detr_fast import Transformer, optimize
from detr_fast.models.packed_transformer import PackedDecoder, PackedLinear, pack_transformer


def packed(model: Transformer) -> Transformer:
    fast = copy.deepcopy(model).eval()
    pack_transformer(fast)
    return fast


@torch.no_grad()
def answers(model: nn.Module, arguments: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hs and the memory of valid cells."""
    src, mask, *others = arguments
    hs, memory = model(src.to(dtype), mask, *(x.to(dtype) for x in others), SIZES)
    return [hs.double(), memory.masked_fill(mask[:, None], 0).double()]


@pytest.mark.parametrize("activation", ["relu", "gelu", "glu"])
@pytest.mark.parametrize("normalize_before", [False, True])
def test_it_computes_what_the_plain_one_does(normalize_before: bool, activation: str) -> None:
    plain = randomised(transformer(0.1, normalize_before=normalize_before, activation=activation)).eval()
    fast, arguments = packed(plain), inputs()
    assert isinstance(fast.decoder, PackedDecoder) and not any(type(m) is nn.Linear for m in fast.modules())
    assert answers(fast, arguments)[0].dtype == torch.float64
    # In float64 nothing is rounded that shows: the packed layers move to it as other layers do.
    exact = answers(copy.deepcopy(plain).double(), arguments, torch.float64)
    torch.testing.assert_close(answers(packed(plain).double(), arguments, torch.float64), exact, rtol=1e-8, atol=1e-8)


def test_float32_is_as_exact_as_the_plain_ones() -> None:
    errors = torch.zeros(2, dtype=torch.float64)
    for _ in range(5):
        plain, arguments = randomised(transformer()).eval(), inputs()
        exact = answers(copy.deepcopy(plain).double(), arguments, torch.float64)
        for place, model in enumerate((packed(plain), plain)):
            errors[place] += sum((a - b).square().sum() for a, b in zip(answers(model, arguments), exact, strict=True))
    ours, theirs = errors.sqrt()
    assert 0 < ours <= 2 * theirs


def test_a_linear_layer() -> None:
    linear, x = nn.Linear(5, 3).requires_grad_(False), torch.randn(2, 4, 5)
    for rows in (x, x.transpose(0, 1), x[:0], x[..., :1].expand(-1, -1, 5)):
        torch.testing.assert_close(PackedLinear.of(linear)(rows), linear(rows))
        torch.testing.assert_close(PackedLinear.of(linear, relu=True)(rows), linear(rows).relu())
    assert list(PackedLinear.of(linear).state_dict()) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_can_be_copied(copied) -> None:
    fast, arguments = packed(randomised(transformer())), inputs()
    expected = answers(fast, arguments)
    torch.testing.assert_close(answers(copied(fast), arguments), expected, rtol=0, atol=0)


def test_threads_may_call_it_at_once() -> None:
    fast, arguments = packed(randomised(transformer())), inputs()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: answers(fast, arguments), range(8)))
    for each in found:
        torch.testing.assert_close(each, found[0], rtol=0, atol=0)


def test_optimize_packs_it_in_float32_without_a_compiler() -> None:
    model = resnet_detr()
    assert isinstance(optimize(model).transformer.decoder, PackedDecoder)
    assert not isinstance(model.transformer.decoder, PackedDecoder)
    for other in (optimize(model, dtype=torch.bfloat16), optimize(model, compile=True), optimize(model.double())):
        assert not isinstance(other.transformer.decoder, PackedDecoder)
