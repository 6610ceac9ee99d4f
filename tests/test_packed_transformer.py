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
from detr_fast.ops import _native, transformer_layers

WHY_NOT = _native.load().why_not
needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


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


def moderate(model: Transformer) -> Transformer:
    """With norms and biases that show, and attention not as sharp as that of ``randomised``.

    Sharp attention makes a rounding a hundred times as large in some draws, so that two ways of rounding tell nothing.
    """
    model.requires_grad_(False)
    for vector in (parameter for parameter in model.parameters() if parameter.ndim == 1):
        vector.add_(0.1 * torch.randn_like(vector))
    return model


def test_float32_is_as_exact_as_the_plain_ones() -> None:
    errors = torch.zeros(2, dtype=torch.float64)
    for _ in range(5):
        plain, arguments = moderate(transformer()).eval(), inputs()
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


def wide(**options) -> Transformer:
    """A transformer of a width that native code takes all layers of at once."""
    return moderate(Transformer(64, 2, 2, 2, 128, return_intermediate_dec=True, **options))


def wide_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    src, mask, query_embed, pos = inputs()
    return src.repeat(1, 4, 1, 1), mask, query_embed.repeat(1, 4), pos.repeat(1, 4, 1, 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What calls of all layers at once return, from now on."""
    found: list[tuple[Tensor, Tensor]] = []

    def counted(*arguments, **options) -> tuple[Tensor, Tensor]:
        found.append(transformer_layers(*arguments, **options))
        return found[-1]

    monkeypatch.setattr("detr_fast.models.packed_transformer.transformer_layers", counted)
    return found


@needs_native
@pytest.mark.parametrize("last_alone", [False, True])
def test_all_layers_at_once(calls: list[tuple[Tensor, Tensor]], last_alone: bool) -> None:
    errors = torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        plain, arguments = wide().eval(), wide_inputs()
        plain.decoder.return_intermediate = not last_alone
        exact = answers(copy.deepcopy(plain).double(), arguments, torch.float64)
        for place, model in enumerate((packed(plain), plain)):
            errors[place] += sum((a - b).square().sum() for a, b in zip(answers(model, arguments), exact, strict=True))
    ours, theirs = errors.sqrt()
    assert len(calls) == 3 and 0 < ours <= 2 * theirs


@needs_native
def test_unusual_ones_go_layer_by_layer(calls: list[tuple[Tensor, Tensor]]) -> None:
    arguments = wide_inputs()
    other_eps = wide()
    other_eps.encoder.layers[0].norm1.eps = 0.1
    for plain in (wide(normalize_before=True), wide(activation="gelu"), other_eps):
        expected = answers(plain.eval(), arguments)
        torch.testing.assert_close(answers(packed(plain), arguments), expected, rtol=1e-4, atol=1e-4)
    assert not calls


@needs_native
def test_hooks_inside_are_called(calls: list[tuple[Tensor, Tensor]]) -> None:
    fast, arguments, seen = packed(wide()), wide_inputs(), []
    handle = fast.decoder.layers[-1].multihead_attn.register_forward_pre_hook(lambda *_: seen.append(1))
    slow = answers(fast, arguments)
    assert seen and not calls
    handle.remove()
    torch.testing.assert_close(answers(fast, arguments), slow, rtol=1e-4, atol=1e-4)
    assert len(seen) == len(calls) == 1


@needs_native
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_all_layers_at_once(copied, calls: list[tuple[Tensor, Tensor]]) -> None:
    fast, arguments = packed(wide()), wide_inputs()
    expected = answers(fast, arguments)
    torch.testing.assert_close(answers(copied(fast), arguments), expected, rtol=0, atol=0)
    assert len(calls) == 2
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: answers(fast, arguments), range(8)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_linear_layers_around_the_transformer_are_packed() -> None:
    model, images = resnet_detr().eval(), torch.randn(2, 3, 64, 96)
    fast = optimize(model)
    parts = (fast.input_proj, fast.class_embed, *fast.bbox_embed)
    assert all(isinstance(part, PackedLinear) for part in parts)
    with torch.inference_mode():
        expected, found = model.double()(images.double()), fast.double()(images.double())
    for name in ("pred_logits", "pred_boxes"):
        # In float64 nothing is rounded that shows but what is left of the weights when they are packed in float32.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
