"""Attention natively with vectors of every width: exactness, dropout bit for bit, the same bits."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from detr_fast.ops import Dropout, TokenOffsets, _native, attention
from detr_fast.ops.attention.native import attention_native, attention_native_backward, why_not
from detr_fast.ops.attention.types import AttentionInputs
from detr_fast.ops.dropout import attention_keep_mask
from ops.attention_cases import (
    ORDINARY,
    SHAPES,
    Shape,
    assert_as_exact_as,
    gradients,
    in_double,
    make_inputs,
    oracle,
)

REASON = _native.why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
# Two vectors of queries and three, a fourth, a part of one; keys that are no whole tile, block or group of 32.
BLOCKS = {f"{n} queries": Shape(1, 32, [n], [n + 130]) for n in (8, 17, 24, 48, 49, 64, 65, 100)}
PARTS = {"keys in parts": Shape(1, 32, [33, 7], [600, 70]), "a real size": Shape(2, 32, [100], [850])}


def run(inputs: AttentionInputs, grad: Tensor) -> list[Tensor]:
    out, log_sum = attention_native(inputs)
    return [out, *attention_native_backward(inputs, grad, out, log_sum)]


@pytest.mark.parametrize("p", [None, 0.25])
@pytest.mark.parametrize("shape", {**SHAPES, **BLOCKS, **PARTS}.values(), ids={**SHAPES, **BLOCKS, **PARTS})
@pytest.mark.usefixtures("vector_bytes")
def test_every_width_is_as_exact_as_sdpa(shape: Shape, p: float | None) -> None:
    inputs = make_inputs(shape, p=p)
    grad = torch.randn(inputs.query.shape)
    exact = gradients(oracle, in_double(inputs), grad.double())
    theirs = gradients(oracle, inputs, grad)
    assert_as_exact_as(run(inputs, grad), theirs, exact, "of native")


def test_weights_too_small_to_be_normal() -> None:
    """They count for nothing, because processors take long for such numbers; those of others stay what they are."""
    inputs = make_inputs(PARTS["a real size"])
    far_apart = inputs._replace(query=inputs.query * 20, key=inputs.key * 20)
    scores = torch.einsum("qhe,khe->hqk", far_apart.query, far_apart.key) * inputs.scale
    assert (scores.amax(-1, keepdim=True) - scores > 87).float().mean() > 0.5  # e^-88 is not normal
    out = run(far_apart, torch.randn(inputs.query.shape))[0]
    # A score's rounding is the relative change of its weight.
    tolerance = 8 * torch.finfo(torch.float32).eps * scores.abs().max() * inputs.value.abs().max()
    assert (out.double() - oracle(in_double(far_apart))).abs().max() <= tolerance
    tiny = torch.full((1,), 1e-39)
    assert (tiny + tiny).item() > 1.5e-39


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only on x86 do they count for nothing")
def test_a_result_too_small_to_be_normal_is_zero() -> None:
    offsets = TokenOffsets.of([1], "cpu"), TokenOffsets.of([2], "cpu")
    query, value = torch.ones(1, 1, 16), torch.tensor([0.0, 1e-3]).view(2, 1, 1).expand(2, 1, 16)
    key = torch.tensor([0.0, -100 / 16]).view(2, 1, 1).expand(2, 1, 16)  # scores 0 and -100
    out, _ = attention_native(AttentionInputs(query, key, value, *offsets, 1.0, None))
    assert torch.equal(out.view(torch.int32), torch.zeros_like(out, dtype=torch.int32))  # == takes both for equal


@pytest.mark.usefixtures("vector_bytes")
def test_drops_what_the_generator_says() -> None:
    """Values are one-hot, so that an output is a weight, and so are the output's gradients, so that a value's is."""
    size, images, heads = 128, 3, 2
    offsets = TokenOffsets.of([size] * images, "cpu")
    query, key = torch.randn(2, images * size, heads, size).unbind(0)
    one_hot = torch.eye(size).repeat(images, 1)[:, None].expand(-1, heads, -1)
    for p in (0.1, 0.5, 0.99):
        dropout = Dropout.draw(p, torch.device("cpu"))
        inputs = AttentionInputs(query, key, one_hot, offsets, offsets, 0.01, dropout)
        out, _, _, grad_value = run(inputs, one_hot)
        for image in range(images):
            kept = attention_keep_mask(dropout, image, heads, size, size)
            tokens = slice(image * size, (image + 1) * size)
            assert torch.equal(out[tokens].permute(1, 0, 2) != 0, kept)
            assert torch.equal(grad_value[tokens].permute(1, 2, 0) != 0, kept)


@pytest.fixture
def thread_counts() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.usefixtures("vector_bytes")
def test_the_same_bits_for_any_number_of_threads() -> None:
    inputs = make_inputs(Shape(3, 32, [500, 7, 0, 65], [300, 700, 5, 0]), p=0.1)
    grad = torch.randn(inputs.query.shape)
    results = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        results.append(run(inputs, grad))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_an_images_bits_are_the_same_alone_and_among_others() -> None:
    inputs = make_inputs(Shape(2, 32, [37, 5, 64], [70, 333, 64]))
    together = attention(*inputs[:5], backend="native")
    alone = [inputs.query[37:42], inputs.key[70:403], inputs.value[70:403]]
    offsets = TokenOffsets.of([5], "cpu"), TokenOffsets.of([333], "cpu")
    assert torch.equal(attention(*alone, *offsets, backend="native"), together[37:42])


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-4])
@pytest.mark.usefixtures("vector_bytes")
def test_any_scale(scale: float) -> None:
    inputs = make_inputs(ORDINARY)._replace(scale=scale)
    grad = torch.randn(inputs.query.shape)
    exact = gradients(oracle, in_double(inputs), grad.double())
    theirs = gradients(oracle, inputs, grad)
    assert_as_exact_as(run(inputs, grad), theirs, exact, "of native")


@pytest.mark.parametrize("factor", [30.0, 3e3])
@pytest.mark.usefixtures("vector_bytes")
def test_scores_that_leave_one_key(factor: float) -> None:
    """Far below the highest score, weights are the smallest normal number instead of less: nothing beside 1."""
    inputs = make_inputs(Shape(2, 32, [50], [200]))
    inputs = inputs._replace(query=inputs.query * factor)
    out, _ = attention_native(inputs)
    exact = oracle(in_double(inputs))
    score = torch.einsum("qhe,khe->qhk", inputs.query, inputs.key).abs().max() * inputs.scale
    torch.testing.assert_close(out.double(), exact, atol=float(score) * 1e-6, rtol=0)


def test_says_what_it_cannot_run() -> None:
    assert why_not(torch.empty(1, 1, 32)) is None
    assert "multiples of 8 up to 128, not 20" in str(why_not(torch.empty(1, 1, 20)))
    assert "multiples of 8 up to 128, not 136" in str(why_not(torch.empty(1, 1, 136)))
    assert "computes in float32, which is too little for torch.float64" in str(why_not(torch.empty(1, 1, 32).double()))
    inputs = make_inputs(Shape(1, 20, [3], [4]))
    with pytest.raises(NotImplementedError, match="backend='native': its native code is for head sizes"):
        attention(*inputs[:5], backend="native")
