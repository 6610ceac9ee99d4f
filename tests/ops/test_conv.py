"""Convolution with bias, residual and ReLU: every backend against float64, at every width of vectors."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops import PackedConv, _native, conv, pack_conv

WHY_NOT = _native.load().why_not
needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


class Layer(NamedTuple):
    batch: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: int = 0
    dilation: int = 1


LAYERS = {
    "one pixel, one channel": Layer(1, 1, (1, 1), 1),
    "1x1": Layer(1, 64, (9, 13), 64),
    "1x1, odd channels": Layer(2, 33, (5, 7), 70),
    "1x1 deep": Layer(1, 1030, (3, 5), 130),
    "1x1 stride 2": Layer(2, 24, (9, 8), 128, stride=2),
    "1x1 in one row": Layer(1, 16, (1, 31), 65),
    "1x1 padded": Layer(1, 5, (4, 4), 64, padding=1),
    "3x3": Layer(2, 17, (7, 6), 40, (3, 3), padding=1),
    "3x3 of one pixel": Layer(1, 64, (1, 1), 64, (3, 3), padding=1),
    "3x3 stride 2": Layer(2, 64, (11, 12), 64, (3, 3), stride=2, padding=1),
    "3x3 dilated": Layer(1, 32, (9, 7), 96, (3, 3), padding=2, dilation=2),
    "3x3 without padding": Layer(1, 8, (5, 5), 64, (3, 3)),
    "3x3 with much padding": Layer(1, 8, (2, 3), 9, (3, 3), padding=5),
    "not square": Layer(2, 7, (8, 9), 64, (2, 5), stride=3, padding=2),
    "stem": Layer(2, 3, (23, 38), 64, (7, 7), stride=2, padding=3),
    "stem of one row": Layer(1, 3, (1, 9), 64, (7, 7), stride=2, padding=3),
    "no images": Layer(0, 16, (4, 4), 8),
    "real": Layer(1, 512, (25, 34), 512, (3, 3), padding=1),
}


def case(layer: Layer, bias: bool = True) -> tuple[Tensor, PackedConv]:
    x = torch.randn(layer.batch, layer.channels, *layer.size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(layer.out_channels, layer.channels, *layer.kernel) / layer.channels**0.5
    packed = PackedConv.of(
        weight,
        torch.randn(layer.out_channels) if bias else None,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
    )
    return x, packed


def exact(x: Tensor, packed: PackedConv, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    bias = None if packed.bias is None else packed.bias.double()
    y = F.conv2d(x.double(), packed.weight.double(), bias, packed.stride, packed.padding, packed.dilation)
    y = y if residual is None else y + residual
    return y.clamp_min(0) if relu else y


def assert_right(found: Tensor, expected: Tensor, x: Tensor, packed: PackedConv) -> None:
    """Within the bound of a sum of as many products, in any order; most are far below it."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    bias = None if packed.bias is None else packed.bias.abs().double()
    magnitude = F.conv2d(
        x.abs().double(), packed.weight.abs().double(), bias, packed.stride, packed.padding, packed.dilation
    )
    terms = packed.weight[0].numel() + 2
    bound = 2.0**-24 * (4 * terms**0.5 + 4) * (magnitude + expected.abs()) + 1e-30
    assert ((found - expected).abs() <= bound).all(), ((found - expected).abs() / bound).max()


@needs_native
@pytest.mark.parametrize("name", LAYERS)
def test_native_is_right_at_every_width(name: str, vector_bytes: int) -> None:
    x, packed = case(LAYERS[name])
    assert_right(conv(x, packed, backend="native", algorithm="gemm"), exact(x, packed), x, packed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["1x1", "1x1, odd channels", "3x3 stride 2", "stem"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bias_residual_and_relu(backend: str, name: str, relu: bool, bias: bool) -> None:
    x, packed = case(LAYERS[name], bias)
    plain = exact(x, packed)
    assert_right(conv(x, packed, relu=relu, backend=backend), exact(x, packed, None, relu), x, packed)
    residual = torch.randn(plain.shape).contiguous(memory_format=torch.channels_last)
    expected = exact(x, packed, residual, relu)
    assert not relu or 0.1 < (expected == 0).double().mean() < 0.9
    assert_right(conv(x, packed, residual=residual, relu=relu, backend=backend), expected, x, packed)
    gate = torch.randn_like(residual).relu()
    gated = conv(x, packed, residual=residual, relu=relu, gate=gate, backend=backend)
    assert_right(gated, expected * (gate > 0), x, packed)
    into = torch.full_like(residual, torch.nan)
    assert conv(x, packed, residual=residual, relu=relu, out=into, backend=backend) is into
    assert_right(into, expected, x, packed)
    assert conv(x, packed, residual=residual, relu=relu, out=residual, backend=backend) is residual
    assert_right(residual, expected, x, packed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_in_other_layouts_are_copied(backend: str) -> None:
    x, packed = case(LAYERS["3x3"])
    wide = torch.randn(2, 17, 7, 20)[..., 3:9]
    residual = torch.randn(2, 40, 7, 6)
    expected = exact(wide, packed, residual)
    assert_right(conv(wide, packed, residual=residual, backend=backend), expected, wide, packed)
    assert_right(conv(x.contiguous(), packed, backend=backend), exact(x, packed), x, packed)


@needs_native
def test_nan_and_infinity_stay_where_they_are_seen() -> None:
    x, packed = case(LAYERS["3x3"])
    x[0, 3, 0, 0] = torch.nan
    x[1, 3, 6, 5] = torch.inf
    found = conv(x, packed, relu=True, backend="native")
    seen = torch.zeros(2, 7, 6, dtype=torch.bool)
    seen[0, :2, :2] = seen[1, 5:, 4:] = True
    assert found[0, :, :2, :2].isnan().all()
    assert found.permute(0, 2, 3, 1)[~seen].isfinite().all()


@needs_native
@pytest.mark.parametrize("name", ["1x1 stride 2", "3x3", "stem"])
def test_results_do_not_depend_on_threads(name: str) -> None:
    x, packed = case(LAYERS[name])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = conv(x, packed, backend="native")
        torch.set_num_threads(3)
        assert torch.equal(conv(x, packed, backend="native"), alone)
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_concurrent_callers_share_a_packed_conv() -> None:
    x, packed = case(LAYERS["3x3"])
    maps = [torch.randn_like(x) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda m: conv(m, packed, backend="native"), maps))
    for m, y in zip(maps, found, strict=True):
        assert_right(y, exact(m, packed), m, packed)


def test_a_packed_conv_can_be_pickled() -> None:
    x, packed = case(LAYERS["3x3"])
    expected = conv(x, packed)
    stored = pickle.dumps(packed)
    assert len(stored) < 4 * packed.weight.numel() + 4096  # without the forms made of it
    assert torch.equal(conv(x, pickle.loads(stored)), expected)
    assert repr(packed) == "PackedConv(40x17x3x3, stride=1, padding=1, dilation=1)"


def test_weights_of_other_devices_lie_as_their_maps_do() -> None:
    weight = torch.randn(8, 4, 3, 3)
    elsewhere, here = (PackedConv.of(x).weight for x in (weight.to("meta"), weight))
    assert elsewhere.is_contiguous(memory_format=torch.channels_last) and here.is_contiguous()


def test_other_dtypes_take_the_reference() -> None:
    x, packed = case(LAYERS["3x3"])
    exactly = PackedConv.of(packed.weight.double(), None, padding=1)
    assert conv(x.double(), exactly).dtype == torch.float64
    half = PackedConv.of(packed.weight.bfloat16(), None, padding=1)
    assert conv(x.bfloat16(), half).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match=r"is for float32, and the map is torch\.float64"):
        conv(x.double(), exactly, backend="native")


def test_it_can_be_compiled() -> None:
    x, packed = case(LAYERS["3x3"])
    compiled = torch.compile(lambda m: conv(m, packed, relu=True) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x, packed, relu=True) + 1, rtol=1e-5, atol=1e-5)


def test_bad_input_is_refused() -> None:
    x, packed = case(LAYERS["3x3"])
    with pytest.raises(ValueError, match=r"weight must be float \[K, C, R, S\] without a zero, got .* \[3, 3\]"):
        PackedConv.of(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \[40\] on cpu, as the weight is, got .*\[39\]"):
        PackedConv.of(packed.weight, torch.zeros(39))
    for name, value in (("stride", 0), ("padding", -1), ("dilation", 0), ("stride", 1.5)):
        with pytest.raises(ValueError, match=f"{name} must be an integer from .* on, got {value}"):
            PackedConv.of(packed.weight, **{name: value})
    with pytest.raises(ValueError, match=r"x must be \[B, 17, H, W\] with pixels, got \[2, 16, 7, 6\]"):
        conv(x[:, :16], packed)
    with pytest.raises(ValueError, match=r"x must be torch.float32 on cpu, as the weight is, got torch.float64"):
        conv(x.double(), packed)
    with pytest.raises(ValueError, match=r"x must be at least as large as the kernel .* got \[2, 17, 2, 6\]"):
        conv(x[:, :, :2], PackedConv.of(packed.weight))
    with pytest.raises(ValueError, match="algorithm must be None or one of gemm, winograd"):
        conv(x, packed, algorithm="fft")
    with pytest.raises(ValueError, match="backend of conv must be None or one of"):
        conv(x, packed, backend="cudnn")
    with pytest.raises(ValueError, match=r"residual must be torch.float32 \[2, 40, 7, 6\] on cpu, got .*\[2, 40, 7, 5"):
        conv(x, packed, residual=torch.zeros(2, 40, 7, 5))


def test_memory_that_cannot_be_written_to_is_refused() -> None:
    x, packed = case(LAYERS["3x3"])
    with pytest.raises(ValueError, match=r"out must be torch.float32 \[2, 40, 7, 6\] on cpu, got .*\[2, 40, 7, 5"):
        conv(x, packed, out=torch.zeros(2, 40, 7, 5))
    with pytest.raises(ValueError, match="out must be channels last"):
        conv(x, packed, out=torch.zeros(2, 40, 7, 6))
    memory = torch.zeros(4 * 42 * 40)
    square = PackedConv.of(torch.zeros(17, 17, 3, 3), padding=1)
    with pytest.raises(ValueError, match="out must not share memory with x"):
        conv(x, square, out=x)
    out = memory[40 : 40 + 2 * 42 * 40].view(2, 7, 6, 40).permute(0, 3, 1, 2)
    residual = memory[: 2 * 42 * 40].view(2, 7, 6, 40).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="out must be residual itself or not share memory"):
        conv(x, packed, residual=residual, out=out)
    with pytest.raises(ValueError, match="out must be gate itself or not share memory"):
        conv(x, packed, gate=residual, out=out)
    with pytest.raises(ValueError, match="x, residual, gate, out must not require a gradient"):
        conv(x.requires_grad_(), packed)
    with torch.no_grad():
        conv(x, packed)


def test_of_two_that_pack_at_once_both_get_the_first() -> None:
    """Whoever is late must not replace what the other one already reads from."""
    packed, first = PackedConv.of(torch.randn(2, 2, 1, 1)), []

    def overtaken(packed: PackedConv, weight: Tensor) -> Tensor:
        first.append(packed.panels(lambda _, weight: torch.zeros(1)))
        return torch.ones(1)

    assert packed.panels(overtaken) is first[0]
    assert packed.panels(overtaken) is first[0] and len(first) == 1


@needs_native
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (130, 3, 7, 7), (64, 5, 1, 3), (70, 33, 3, 3)])
def test_the_weight_comes_back_from_panels(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    packed = PackedConv.of(weight)
    assert packed.weight is not weight and packed.weight.data_ptr() == weight.data_ptr()
    with torch.inference_mode():
        conv(torch.randn(1, shape[1], 9, 9), packed, backend="native")
    assert packed.weight.data_ptr() != weight.data_ptr()  # it is not kept beside the panels
    assert torch.equal(packed.weight, weight) and packed.weight.is_contiguous() and not packed.weight.is_inference()
    assert torch.equal(pickle.loads(pickle.dumps(packed)).weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_scaled_weight_is_the_product_and_keeps_nothing_of_the_weight(dtype: torch.dtype) -> None:
    weight, bias, scale = torch.randn(70, 33, 3, 3).to(dtype), torch.randn(70).to(dtype), torch.randn(70).to(dtype)
    product = weight * scale[:, None, None, None]
    weight.requires_grad_()
    packed = pack_conv(weight, bias, scale=scale, padding=1)
    weight.data.zero_()
    assert torch.equal(packed.weight, product) and not packed.weight.requires_grad
    x = torch.randn(1, 33, 5, 6).to(dtype)
    assert torch.equal(conv(x, packed), conv(x, PackedConv.of(product, bias, padding=1)))
    with pytest.raises(ValueError, match=rf"scale must be {dtype} \[70\] on cpu, as the weight is, got .*\[33\]"):
        pack_conv(weight, bias, scale=scale[:33])
