"""All layers of a transformer in one call: native code against float64, however tokens are divided, and bad input."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from detr_fast.ops import (
    DecoderLayer,
    EncoderLayer,
    Norm,
    PackedConv,
    TokenOffsets,
    TransformerLayers,
    _native,
    transformer_layers,
)

WHY_NOT = _native.load().why_not
needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


class Size(NamedTuple):
    lengths: tuple[int, ...]
    queries: int = 7
    width: int = 64
    heads: int = 2
    inner: int = 128
    encoder: int = 1
    decoder: int = 2


CASES = {
    "three images": Size((20, 1, 37)),
    "an image without tokens": Size((5, 0, 9)),
    "more rows than a block has": Size((350,), queries=170),
    "one token, one query": Size((1,), queries=1, encoder=2),
    "wide": Size((30,), width=192, heads=3, inner=64),
    "a network made in two parts": Size((13, 14), inner=576, heads=8),
    "no encoder": Size((11, 6), encoder=0, decoder=1),
}
EMPTY = {"no images": Size(()), "no tokens": Size((0,)), "no queries": Size((6,), queries=0)}


def linear(inputs: int, outputs: int) -> PackedConv:
    return PackedConv.of(torch.randn(outputs, inputs, 1, 1) / inputs**0.5, 0.3 * torch.randn(outputs))


def norm(width: int) -> Norm:
    return Norm(1 + 0.2 * torch.randn(width), 0.2 * torch.randn(width), 1e-5)


def weights(size: Size) -> TransformerLayers:
    d, inner = size.width, size.inner

    def attention() -> tuple[PackedConv, PackedConv, PackedConv, Norm]:
        return linear(d, 2 * d), linear(d, d), linear(d, d), norm(d)

    def network() -> tuple[PackedConv, PackedConv, Norm]:
        return linear(d, inner), linear(inner, d), norm(d)

    encoder = tuple(EncoderLayer(*attention(), *network()) for _ in range(size.encoder))
    crossing = (linear(d, d), linear(d, d), norm(d))
    decoder = tuple(DecoderLayer(*attention(), *crossing, *network()) for _ in range(size.decoder))
    of_memory = (linear(d, size.decoder * d) for _ in range(2))
    return TransformerLayers(size.heads, encoder, decoder, *of_memory, norm(d))


def converted(value: Any, dtype: torch.dtype) -> Any:
    """Weights in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, PackedConv):
        return PackedConv.of(value.weight.to(dtype), value.bias.to(dtype))
    if isinstance(value, tuple):
        parts = [converted(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def case(size: Size) -> tuple[Tensor, Tensor, Tensor, TransformerLayers, TokenOffsets]:
    tokens = (torch.randn(sum(size.lengths), size.width) for _ in range(2))
    return *tokens, torch.randn(size.queries, size.width), weights(size), TokenOffsets.of(list(size.lengths), "cpu")


def exact(arguments: tuple[Any, ...]) -> list[Tensor]:
    """hs and memory in float64."""
    x, pos, query_pos, layers, offsets = arguments
    doubles = (tensor.double() for tensor in (x, pos, query_pos))
    return list(transformer_layers(*doubles, converted(layers, torch.float64), offsets, backend="reference"))


def error(found: tuple[Tensor, ...], expected: list[Tensor]) -> float:
    """Root of the sum of squares."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    return sum((a - b).square().sum().item() for a, b in zip(found, expected, strict=True)) ** 0.5


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_native_is_as_exact_as_the_reference(name: str, vector_bytes: int) -> None:
    arguments = case(CASES[name])
    expected = exact(arguments)
    ours, theirs = (error(transformer_layers(*arguments, backend=b), expected) for b in ("native", "reference"))
    # Of numbers about 1 that are rounded in some ten places one behind the other, each by at most half an ulp, the
    # reference's error cannot be small by chance; the second term is one such place's.
    ulps = 2.0**-24 * sum(x.square().sum().item() for x in expected) ** 0.5
    assert ours <= 2 * theirs + ulps


@needs_native
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_compute_with(name: str) -> None:
    arguments = case(EMPTY[name])
    found, expected = (transformer_layers(*arguments, backend=backend) for backend in ("native", "reference"))
    torch.testing.assert_close(found, expected)


@needs_native
@pytest.mark.parametrize("name", ["three images", "more rows than a block has"])
def test_the_same_bits_on_any_number_of_threads(name: str) -> None:
    arguments, threads = case(CASES[name]), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(transformer_layers(*arguments, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_the_last_layer_alone(backend: str) -> None:
    arguments = case(CASES["three images"])
    every, memory = transformer_layers(*arguments, backend=backend)
    last, same_memory = transformer_layers(*arguments, every_layer=False, backend=backend)
    assert every.shape == (2, 3, 7, 64) and torch.equal(last, every[-1:]) and torch.equal(same_memory, memory)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_tensors_of_any_strides_which_stay_as_they_are(backend: str) -> None:
    x, pos, query_pos, *rest = case(CASES["three images"])
    expected = transformer_layers(x, pos, query_pos, *rest, backend=backend)
    turned = [tensor.t().contiguous().t() for tensor in (x, pos, query_pos)]
    torch.testing.assert_close(transformer_layers(*turned, *rest, backend=backend), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(turned, (x, pos, query_pos), strict=True))


def test_float64_takes_the_reference() -> None:
    x, pos, query_pos, layers, offsets = case(CASES["no encoder"])
    doubles = x.double(), pos.double(), query_pos.double(), converted(layers, torch.float64), offsets
    assert transformer_layers(*doubles)[0].dtype == torch.float64
    with pytest.raises(NotImplementedError, match="is for float32, and the tokens are torch.float64"):
        transformer_layers(*doubles, backend="native")


def test_what_native_code_cannot_run() -> None:
    for width, heads, inner, message in (
        (48, 2, 64, "multiples of 64, not 48 and 64"),
        (64, 2, 40, "multiples of 64, not 64 and 40"),
        (64, 16, 64, "multiples of 8 up to 128, not 4"),
    ):
        arguments = case(Size((3,), width=width, heads=heads, inner=inner))
        with pytest.raises(NotImplementedError, match=message):
            transformer_layers(*arguments, backend="native")
        assert transformer_layers(*arguments)[0].shape == (2, 1, 7, width)


def test_bad_input() -> None:
    x, pos, query_pos, layers, offsets = case(CASES["three images"])
    with pytest.raises(ValueError, match=r"x must be torch.float32 \[58, 64\], got torch.float32 \[57, 64\]"):
        transformer_layers(x[1:], pos, query_pos, layers, offsets)
    with pytest.raises(ValueError, match=r"pos must be torch.float32 \[58, 64\], got torch.float64"):
        transformer_layers(x, pos.double(), query_pos, layers, offsets)
    with pytest.raises(ValueError, match=r"query_pos must be torch.float32 \[7, 64\], got torch.float32 \[7, 32\]"):
        transformer_layers(x, pos, query_pos[:, ::2], layers, offsets)
    with pytest.raises(ValueError, match=r"norms must have one eps, got \[1e-05, 0.1\]"):
        transformer_layers(x, pos, query_pos, layers._replace(norm=layers.norm._replace(eps=0.1)), offsets)
    with pytest.raises(ValueError, match="gradient"):
        transformer_layers(x.requires_grad_(), pos, query_pos, layers, offsets)
