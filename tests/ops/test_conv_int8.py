"""Convolution of bytes: exact integers at every width of vectors and with all instructions, and their scaling."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from detr_fast.ops import PackedConvInt8, Steps, _native, conv_int8, to_bytes
from detr_fast.ops.conv_int8.native import INSTRUCTIONS, has_instructions

WHY_NOT = _native.load().why_not
needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


class Layer(NamedTuple):
    batch: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    place: tuple[int, int, int] = (1, 0, 1)


LAYERS = {
    "one pixel, one channel": Layer(1, 1, (1, 1), 1),
    "1x1": Layer(1, 64, (9, 13), 64),
    "1x1, whole tiles": Layer(1, 128, (8, 16), 64),
    "1x1, odd channels": Layer(2, 33, (5, 7), 70),
    "1x1 deep": Layer(1, 1030, (3, 5), 130),
    "1x1 stride 2": Layer(2, 24, (9, 8), 128, place=(2, 0, 1)),
    "1x1 padded": Layer(1, 5, (4, 4), 64, place=(1, 1, 1)),
    "3x3": Layer(2, 17, (7, 6), 40, (3, 3), (1, 1, 1)),
    "3x3 of one pixel": Layer(1, 64, (1, 1), 64, (3, 3), (1, 1, 1)),
    "3x3 stride 2": Layer(2, 64, (11, 12), 64, (3, 3), (2, 1, 1)),
    "3x3 dilated": Layer(1, 64, (9, 9), 72, (3, 3), (1, 2, 2)),
    "5x2 without padding": Layer(1, 7, (9, 8), 3, (5, 2)),
    "several blocks": Layer(1, 64, (41, 40), 64, (3, 3), (1, 1, 1)),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> str:
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)
    if not has_instructions(request.param):
        pytest.skip(f"this processor lacks the instructions {request.param!r}")
    return str(request.param)


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def inputs(layer: Layer) -> tuple[Tensor, Tensor]:
    """A map, and a weight of integers that 8 bits hold as they are: each channel's largest is 127."""
    weight = torch.randint(-127, 128, (layer.out_channels, layer.channels, *layer.kernel)).float()
    weight[:, 0, 0, 0] = 127
    return bytes_of(layer.batch, layer.channels, *layer.size), weight


def sums_of(x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """[B, K, H', W'] int64, tap by tap."""
    stride, padding, dilation = layer.place
    batch, channels, height, width = x.shape
    padded = torch.zeros(batch, channels, height + 2 * padding, width + 2 * padding, dtype=torch.int64)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    rows, columns = (
        (length + 2 * padding - dilation * (side - 1) - 1) // stride + 1
        for length, side in zip(layer.size, layer.kernel, strict=True)
    )
    found = torch.zeros(batch, len(weight), rows, columns, dtype=torch.int64)
    for i in range(layer.kernel[0]):
        for j in range(layer.kernel[1]):
            under = padded[:, :, i * dilation :: stride, j * dilation :: stride][:, :, :rows, :columns]
            found += torch.einsum("bchw,kc->bkhw", under, weight[:, :, i, j].long())
    return found


@layers
def test_sums_are_exact(layer: Layer, vector_bytes: int) -> None:
    x, weight = inputs(layer)
    packed = PackedConvInt8.of(weight, x=Steps(1.0), place=layer.place)
    assert torch.equal(conv_int8(x, packed, backend="native"), sums_of(x, weight, layer).float())


@layers
def test_sums_are_exact_with_all_instructions(layer: Layer, instructions: str) -> None:
    x, weight = inputs(layer)
    packed = PackedConvInt8.of(weight, x=Steps(1.0), place=layer.place)
    assert torch.equal(conv_int8(x, packed, instructions=instructions), sums_of(x, weight, layer).float())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_do_not_saturate(sign: int, instructions: str) -> None:
    packed = PackedConvInt8.of(torch.full((64, 4608, 1, 1), 127.0 * sign), x=Steps(1.0))
    found = conv_int8(torch.full((1, 4608, 1, 3), 255, dtype=torch.uint8), packed, instructions=instructions)
    assert torch.equal(found, torch.full((1, 64, 1, 3), float(sign * 255 * 127 * 4608)))


@pytest.mark.parametrize("backend", BACKENDS)
@layers
def test_reference_sums_are_exact(layer: Layer, backend: str) -> None:
    x, weight = inputs(layer)
    packed = PackedConvInt8.of(weight, x=Steps(1.0), place=layer.place)
    expected = sums_of(x, weight, layer).float()
    assert torch.equal(conv_int8(x, packed, backend=backend), expected)
    assert torch.equal(conv_int8(x, packed, relu=True, backend=backend), expected.clamp_min(0))


def results(layer: Layer, *, shortcut_zero: int) -> tuple[Tensor, PackedConvInt8, Tensor, Tensor, Tensor]:
    """A layer whose bytes fill their range, what is added, the result before it is rounded, and its uncertainty."""
    x, weight = inputs(layer)
    sums = sums_of(x, weight, layer).double()
    bias, residual = torch.randn(layer.out_channels), bytes_of(*sums.shape)
    x_steps, residual_steps = Steps(0.01), Steps(0.02, shortcut_zero)
    out_steps = Steps(max(float(sums.abs().max()) * 0.02 * 0.01, 1.0) / 255)
    settings = {"x": x_steps, "out": out_steps, "residual": residual_steps, "place": layer.place}
    packed = PackedConvInt8.of(weight * 0.02, bias, **settings)
    parts = [
        sums * 0.02 * x_steps.size,
        bias.double()[:, None, None].expand_as(sums),
        (residual.double() - shortcut_zero) * residual_steps.size,
    ]
    exact = sum(parts) / out_steps.size
    # Ten roundings to float32: of factors, the bias and its parts, the sum, products and their sums.
    sizes = sum(part.abs() for part in parts) + shortcut_zero * residual_steps.size
    return x, packed, residual, exact, 10 * 2.0**-24 * sizes / out_steps.size


def assert_rounds(found: Tensor, exact: Tensor, uncertainty: Tensor) -> None:
    assert found.dtype == torch.uint8 and found.is_contiguous(memory_format=torch.channels_last)
    assert ((found.double() - exact.clamp(0, 255)).abs() <= 0.5 + uncertainty).all()


@pytest.mark.parametrize("shortcut_zero", [0, 128])
@layers
def test_results_in_bytes(layer: Layer, shortcut_zero: int, vector_bytes: int) -> None:
    x, packed, residual, exact, uncertainty = results(layer, shortcut_zero=shortcut_zero)
    assert_rounds(conv_int8(x, packed, residual=residual, backend="native"), exact, uncertainty)
    if exact.numel() > 1000:
        assert len(conv_int8(x, packed, residual=residual).unique()) > 100


@layers
def test_reference_results_in_bytes(layer: Layer) -> None:
    x, packed, residual, exact, uncertainty = results(layer, shortcut_zero=128)
    assert_rounds(conv_int8(x, packed, residual=residual, backend="reference"), exact, uncertainty)


@needs_native
def test_result_in_place_of_what_is_added() -> None:
    layer = LAYERS["3x3"]
    x, packed, residual, *_ = results(layer, shortcut_zero=0)
    expected = conv_int8(x, packed, residual=residual)
    out = residual.contiguous(memory_format=torch.channels_last).clone(memory_format=torch.channels_last)
    assert conv_int8(x, packed, residual=out, out=out) is out
    assert torch.equal(out, expected)


def test_a_weights_numbers_and_what_they_stand_for() -> None:
    weight = torch.randn(70, 33, 3, 2)
    packed = PackedConvInt8.of(weight, x=Steps(0.5))
    step = weight.abs().amax((1, 2, 3)) / 127
    assert packed.weight.dtype == torch.int8 and packed.weight.abs().amax() == 127
    torch.testing.assert_close(packed.factor[:70], step * 0.5)
    error = (packed.weight * step[:, None, None, None] - weight).abs()
    assert (error <= step[:, None, None, None] * (0.5 + 127 * 2.0**-22)).all()


def test_a_pickle_gives_the_same() -> None:
    x, weight = inputs(LAYERS["3x3"])
    packed = PackedConvInt8.of(weight, torch.randn(40), x=Steps(1.0), out=Steps(40.0), place=(1, 1, 1))
    assert torch.equal(conv_int8(x, pickle.loads(pickle.dumps(packed))), conv_int8(x, packed))


@needs_native
def test_threads_at_once_and_other_products_in_tiles_between() -> None:
    """AMX has one shape of tiles for each thread, which torch's own bfloat16 products set, too."""
    x, weight = inputs(LAYERS["several blocks"])
    packed = PackedConvInt8.of(weight, x=Steps(1.0), place=(1, 1, 1))
    a, expected = torch.randn(70, 96, dtype=torch.bfloat16), conv_int8(x, packed)
    product = a @ a.T

    def both(_: int) -> bool:
        return torch.equal(conv_int8(x, packed), expected) and torch.equal(a @ a.T, product)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(both, range(16)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_to_bytes(backend: str) -> None:
    x = 300 * torch.randn(2, 3, 7, 11)
    found = to_bytes(x, 0.5, backend=backend)
    assert found.dtype == torch.uint8 and torch.equal(found, (x * 0.5).round().clamp(0, 255).byte())
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5, 1.5, 254.6]).view(1, 1, 1, 6)
    assert to_bytes(special, 1.0, backend=backend).flatten().tolist() == [0, 255, 0, 0, 2, 255]


def test_steps() -> None:
    assert Steps.of(0.0, 51.0) == Steps(0.2, 0)
    assert Steps.of(-12.7, 5.0) == Steps(12.7 / 127, 128)
    assert Steps.of(0.0, 0.0).size > 0


PACKED = PackedConvInt8.of(torch.ones(8, 4, 3, 3), x=Steps(1.0), out=Steps(1.0))
X = torch.zeros(1, 4, 5, 5, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("x", "settings", "message"),
    [
        (X[0], {}, r"x must be \[B, 4, H, W\]"),
        (X.float(), {}, r"x must be torch.uint8 on cpu, as the weight is, got torch.float32"),
        (X[:, :3], {}, r"x must be \[B, 4, H, W\] with pixels, got \[1, 3, 5, 5\]"),
        (X[:, :, :2], {}, "at least as large as the kernel"),
        (X, {"residual": X}, r"residual must be torch.uint8 \[1, 8, 3, 3\] on cpu, got"),
        (X, {"out": torch.zeros(1, 8, 3, 3)}, r"out must be torch.uint8 \[1, 8, 3, 3\] on cpu, got torch.float32"),
        (X, {"out": torch.zeros(1, 8, 3, 3, dtype=torch.uint8)}, "out must be channels last"),
        (X, {"instructions": "mmx"}, "instructions must be None or one of plain, pairs, vnni, amx, got 'mmx'"),
    ],
)
def test_bad_calls(x: Tensor, settings: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_int8(x, PACKED, **settings)


def test_out_beside_x() -> None:
    memory = bytes_of(1, 3, 3, 4).permute(0, 3, 1, 2)
    packed = PackedConvInt8.of(torch.ones(4, 4, 1, 1), x=Steps(1.0), out=Steps(1.0))
    with pytest.raises(ValueError, match="out must not share memory with x"):
        conv_int8(memory, packed, out=memory)


@pytest.mark.parametrize(
    ("weight", "settings", "message"),
    [
        (torch.zeros(2, 3, 1), {}, r"weight must be float \[K, C, R, S\]"),
        (torch.zeros(2, 3, 1, 1, dtype=torch.int8), {}, r"weight must be float \[K, C, R, S\]"),
        (torch.zeros(1, 70000, 1, 1), {}, "at most 66311 numbers a channel"),
        (torch.zeros(2, 3, 1, 1), {"x": Steps(1.0, 128)}, "x must have its zero at 0"),
        (torch.zeros(2, 3, 1, 1), {"bias": torch.zeros(3)}, "bias must be"),
    ],
)
def test_what_cannot_be_packed(weight: Tensor, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedConvInt8.of(weight, **{"x": Steps(1.0), **settings})


def test_to_bytes_of_something_else() -> None:
    with pytest.raises(ValueError, match=r"x must be float32 \[B, C, H, W\], got torch.float64"):
        to_bytes(torch.zeros(1, 1, 1, 1, dtype=torch.float64), 1.0)


@needs_native
def test_instructions_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    native = _native.module()
    native.limit_vector_bytes(16)
    try:
        with pytest.raises(ValueError, match="instructions 'amx' are not there on this processor"):
            conv_int8(X, PACKED, instructions="amx")
    finally:
        native.limit_vector_bytes(64)
