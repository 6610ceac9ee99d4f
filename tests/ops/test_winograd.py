"""Winograd's convolution: against float64, at every width of vectors, with no more rounding than its points promise."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.models.presets import detr_resnet50
from detr_fast.ops import PackedConv, _native, conv
from detr_fast.ops.conv.native import Sizes, fastest, fits_winograd, sizes_of

WHY_NOT = _native.load().why_not
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

# images, channels, rows, columns, channels of the result, dilation
SHAPES = {
    "one pixel": (1, 1, 1, 1, 1, 1),
    "one channel": (1, 1, 9, 6, 1, 1),
    "one row": (2, 16, 1, 23, 32, 1),
    "one patch": (1, 64, 4, 4, 64, 1),
    "a pixel more": (3, 64, 5, 9, 64, 1),
    "odd channels": (2, 19, 13, 10, 37, 1),
    "channels beyond a panel": (1, 70, 7, 8, 130, 1),
    "fewer channels after": (1, 96, 6, 11, 16, 1),
    "dilated": (2, 33, 11, 14, 20, 2),
    "dilated beyond the map": (1, 8, 2, 5, 8, 3),
    "no images": (0, 16, 4, 4, 8, 1),
    "real": (1, 256, 25, 34, 256, 1),
}


def case(name: str) -> tuple[Tensor, PackedConv]:
    images, channels, rows, columns, outputs, dilation = SHAPES[name]
    x = torch.randn(images, channels, rows, columns).relu().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 3, 3) * (2 / 9 / channels) ** 0.5
    return x, PackedConv.of(weight, torch.randn(outputs), padding=dilation, dilation=dilation)


def exact(x: Tensor, packed: PackedConv) -> Tensor:
    bias = None if packed.bias is None else packed.bias.double()
    return F.conv2d(x.double(), packed.weight.double(), bias, 1, packed.padding, packed.dilation)


def assert_right(found: Tensor, expected: Tensor, of_sums: Tensor) -> None:
    """csrc/cpu/winograd_lines.h states twice the error of sums in float32; that of few numbers scatters."""
    assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
    if expected.numel() == 0:
        return
    scale = expected.square().mean().sqrt().clamp_min(1.0)
    error, error_of_sums = ((found - expected) / scale).abs(), ((of_sums - expected) / scale).abs()
    times = 2.5 if expected.numel() > 100_000 else 5
    assert error.max() < times * error_of_sums.max() + 3e-6
    assert error.square().mean() < (times * error_of_sums.square().mean().sqrt() + 3e-7) ** 2


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_right_at_every_width(name: str, vector_bytes: int) -> None:
    x, packed = case(name)
    found = torch.full(exact(x, packed).shape, torch.nan).contiguous(memory_format=torch.channels_last)
    assert conv(x, packed, out=found, algorithm="winograd") is found
    assert_right(found, exact(x, packed), conv(x, packed, backend="reference"))


@pytest.mark.parametrize("name", ["one patch", "odd channels", "dilated"])
@pytest.mark.parametrize("relu", [False, True])
def test_bias_residual_and_relu(name: str, relu: bool, vector_bytes: int) -> None:
    x, packed = case(name)
    plain = exact(x, packed)
    residual = torch.randn(plain.shape).contiguous(memory_format=torch.channels_last)
    lowest = 0.0 if relu else -torch.inf
    expected = (plain + residual).clamp_min(lowest)
    of_sums = conv(x, packed, residual=residual, relu=relu, backend="reference")
    assert_right(conv(x, packed, residual=residual, relu=relu, algorithm="winograd"), expected, of_sums)
    gate = torch.randn_like(residual).relu()
    gated = conv(x, packed, residual=residual, relu=relu, gate=gate, algorithm="winograd")
    assert_right(gated, expected * (gate > 0), of_sums * (gate > 0))
    conv(x, packed, residual=residual, relu=relu, out=residual, algorithm="winograd")
    assert_right(residual, expected, of_sums)
    without = PackedConv.of(packed.weight, padding=packed.padding, dilation=packed.dilation)
    of_sums = conv(x, without, relu=relu, backend="reference")
    assert_right(conv(x, without, relu=relu, algorithm="winograd"), exact(x, without).clamp_min(lowest), of_sums)


@pytest.mark.parametrize("name", ["a pixel more", "odd channels", "dilated", "real"])
def test_neither_threads_nor_a_batch_change_a_bit(name: str) -> None:
    x, packed = case(name)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = conv(x, packed, algorithm="winograd")
        torch.set_num_threads(3)
        assert torch.equal(conv(x, packed, algorithm="winograd"), alone)
        last = x[-1:].contiguous(memory_format=torch.channels_last)
        assert torch.equal(conv(last, packed, algorithm="winograd"), alone[-1:])
    finally:
        torch.set_num_threads(threads)


def test_a_number_that_is_not_finite_spoils_its_patches_alone() -> None:
    x, packed = case("a pixel more")
    x[1, 5, 0, 0] = torch.nan
    found = conv(x, packed, relu=True, algorithm="winograd")
    assert found[1, :, :2, :2].isnan().all()
    assert found[1, :, 4:].isfinite().all() and found[0].isfinite().all() and found[2].isfinite().all()


def test_layers_that_it_cannot_compute_are_refused() -> None:
    x, packed = case("one patch")
    for wrong in ({"padding": 0}, {"padding": 1, "stride": 2}, {"padding": 1, "dilation": 2}):
        other = PackedConv.of(packed.weight, **wrong)
        assert fastest(sizes_of(other, (1, 64, 99, 99))) == "gemm"
        with pytest.raises(
            ValueError, match="'winograd' needs 3x3, stride 1 and padding equal to dilation, got Packed"
        ):
            conv(torch.zeros(1, 64, 9, 9), other, algorithm="winograd")
    with pytest.raises(ValueError, match="'winograd' needs 3x3"):
        conv(x, PackedConv.of(packed.weight[:, :, :1, :1]), algorithm="winograd")


def test_the_layers_of_a_resnet_take_it() -> None:
    weight, large = torch.zeros(64, 64, 3, 3), (20, 27)

    def chosen(weight: Tensor, size: tuple[int, int], stride: int = 1) -> str:
        packed = PackedConv.of(weight, padding=1, stride=stride)
        return fastest(sizes_of(packed, (1, weight.shape[1], *size)))

    assert chosen(weight, large) == "winograd"
    assert chosen(weight, (8, 8)) == "gemm"
    assert chosen(weight, (40, 54), stride=2) == "gemm"
    assert chosen(weight[:, :3], large) == "gemm"


@torch.no_grad()
def test_boxes_of_a_model_move_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer of the backbone that can takes it, one after the other."""
    model, calls = detr_resnet50().eval(), []
    images = [torch.randn(3, 160, 224)]
    found: dict[str, Tensor] = {}
    for algorithm in ("gemm", "winograd"):

        def chosen(sizes: Sizes, algorithm: str = algorithm) -> str:
            calls.append(fits_winograd(sizes))
            return algorithm if calls[-1] else "gemm"

        monkeypatch.setattr(sys.modules["detr_fast.ops.conv.native"], "fastest", chosen)
        found[algorithm] = model(images)["pred_boxes"]
    assert sum(calls) == 2 * 13
    assert 0 < (found["winograd"] - found["gemm"]).abs().max() < 1e-4
