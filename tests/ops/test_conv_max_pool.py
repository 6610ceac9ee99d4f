"""The stem of a ResNet: every backend against float64, at every width of vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops import PackedConv, _native, conv_max_pool

WHY_NOT = _native.load().why_not
needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]

# Map [B, C, H, W], weight [K, R, S], stride and padding.
CASES = {
    "stem": ((2, 3, 45, 61), (64, 7, 7), 2, 3),
    "stem of a batch of one": ((1, 3, 224, 160), (64, 7, 7), 2, 3),
    "one pixel": ((1, 3, 1, 1), (64, 7, 7), 2, 3),
    "one row": ((1, 3, 1, 50), (5, 7, 7), 2, 3),
    "one column": ((2, 1, 50, 1), (70, 3, 3), 1, 1),
    "3x3": ((1, 17, 10, 9), (64, 3, 3), 1, 1),
    "1x1": ((1, 4, 8, 12), (128, 1, 1), 1, 0),
    "steps wider than the kernel": ((1, 2, 20, 21), (64, 2, 3), 4, 2),
    "no images": ((0, 3, 16, 16), (64, 7, 7), 2, 3),
}


def case(name: str) -> tuple[Tensor, PackedConv]:
    shape, (out_channels, *kernel), stride, padding = CASES[name]
    weight = torch.randn(out_channels, shape[1], *kernel)
    return torch.randn(shape), PackedConv.of(weight, torch.randn(out_channels), stride=stride, padding=padding)


def assert_right(found: Tensor, x: Tensor, packed: PackedConv) -> None:
    """Within the bound of sums of as many products, in any order; the highest of some is as far off as they are."""
    assert packed.bias is not None
    y = F.conv2d(x.double(), packed.weight.double(), packed.bias.double(), packed.stride, packed.padding)
    expected = F.max_pool2d(y.clamp_min(0), 3, 2, 1)
    assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
    terms = packed.weight[0].numel() + 1
    largest = x.abs().amax() * packed.weight.abs().sum((1, 2, 3)).amax() if x.numel() else 0.0
    assert ((found - expected).abs() <= 2.0**-24 * (4 * terms**0.5 + 4) * largest).all()


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_native_is_right_at_every_width(name: str, vector_bytes: int) -> None:
    x, packed = case(name)
    assert_right(conv_max_pool(x, packed, backend="native"), x, packed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_of_any_layout(backend: str) -> None:
    x, packed = case("stem")
    expected = conv_max_pool(x, packed, backend=backend)
    assert_right(expected, x, packed)
    flipped = torch.randn(2, 61, 3, 90).permute(0, 2, 3, 1)[:, :, ::2]
    for other in (x.contiguous(memory_format=torch.channels_last), flipped):
        assert_right(conv_max_pool(other, packed, backend=backend), other, packed)
    into = torch.full_like(expected, torch.nan)
    assert conv_max_pool(x, packed, out=into, backend=backend) is into
    assert torch.equal(into, expected)


@needs_native
def test_the_bands_of_several_threads_are_the_same() -> None:
    x, packed = case("stem of a batch of one")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = conv_max_pool(x, packed, backend="native")
        torch.set_num_threads(5)
        assert torch.equal(conv_max_pool(x, packed, backend="native"), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is_seen(backend: str) -> None:
    x, packed = case("stem")
    x[1, 2, 44, 60] = torch.nan
    found = conv_max_pool(x, packed, backend=backend)
    assert found[1, :, -1, -1].isnan().all()
    assert found[0].isfinite().all() and found[1, :, :-3].isfinite().all()


def test_it_can_be_compiled() -> None:
    x, packed = case("stem")
    compiled = torch.compile(lambda m: conv_max_pool(m, packed) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), conv_max_pool(x, packed) + 1, rtol=1e-5, atol=1e-4)


def test_bad_input_is_refused() -> None:
    x, packed = case("stem")
    with pytest.raises(ValueError, match="packed must be without dilation, got PackedConv.*dilation=2"):
        conv_max_pool(x, PackedConv.of(packed.weight, dilation=2, padding=6))
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\] with pixels, got \[2, 2, 45, 61\]"):
        conv_max_pool(x[:, :2], packed)
    with pytest.raises(ValueError, match=r"out must be torch.float32 \[2, 64, 12, 16\] on cpu, got .*\[1\]"):
        conv_max_pool(x, packed, out=torch.zeros(1))
    with pytest.raises(ValueError, match="out must be channels last"):
        conv_max_pool(x, packed, out=torch.zeros(2, 64, 12, 16))
    with pytest.raises(ValueError, match="x, out must not require a gradient"):
        conv_max_pool(x.requires_grad_(), packed)
    with pytest.raises(NotImplementedError, match=r"is for float32, and the map is torch\.float64"):
        conv_max_pool(x.detach().double(), PackedConv.of(packed.weight.double()), backend="native")
