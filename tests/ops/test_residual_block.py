"""A residual block in training: every backend against float64, values and gradients, at every width of vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops import FrozenConv, _native, residual_block

WHY_NOT = _native.load().why_not
needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

# channels, layers (channels, kernel, stride, padding, dilation), the shortcut's stride or None, images, rows, columns
BLOCKS: dict[str, tuple[int, list[tuple[int, int, int, int, int]], int | None, int, int, int]] = {
    "bottleneck": (64, [(16, 1, 1, 0, 1), (16, 3, 1, 1, 1), (64, 1, 1, 0, 1)], None, 2, 17, 18),
    "bottleneck, first": (24, [(8, 1, 1, 0, 1), (8, 3, 2, 1, 1), (40, 1, 1, 0, 1)], 2, 2, 9, 12),
    "bottleneck, same size": (24, [(8, 1, 1, 0, 1), (8, 3, 1, 1, 1), (40, 1, 1, 0, 1)], 1, 1, 8, 7),
    "dilated": (32, [(16, 1, 1, 0, 1), (16, 3, 1, 2, 2), (32, 1, 1, 0, 1)], None, 1, 19, 17),
    "basic": (16, [(16, 3, 1, 1, 1), (16, 3, 1, 1, 1)], None, 1, 20, 23),
    "basic, first": (16, [(32, 3, 2, 1, 1), (32, 3, 1, 1, 1)], 2, 2, 11, 10),
    "one layer, odd channels": (7, [(7, 3, 1, 1, 1)], None, 1, 5, 6),
    "one pixel": (8, [(4, 1, 1, 0, 1), (4, 3, 1, 1, 1), (8, 1, 1, 0, 1)], None, 1, 1, 1),
    "first layer has the stride": (8, [(4, 1, 2, 0, 1), (8, 3, 1, 1, 1)], 2, 1, 7, 9),
    "no images": (8, [(4, 1, 1, 0, 1), (8, 3, 1, 1, 1)], 1, 0, 7, 9),
    "map in several rounds": (256, [(8, 3, 1, 1, 1)], 1, 1, 110, 106),
    "real": (256, [(64, 1, 1, 0, 1), (64, 3, 1, 1, 1), (256, 1, 1, 0, 1)], None, 1, 40, 34),
}


def frozen(channels: int, out_channels: int, kernel: int, stride: int, padding: int, dilation: int) -> FrozenConv:
    weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    scale, shift = torch.rand(out_channels) + 0.5, torch.randn(out_channels) / 4
    return FrozenConv(weight.requires_grad_(), scale, shift, stride, padding, dilation)


def case(name: str) -> tuple[Tensor, list[FrozenConv], FrozenConv | None]:
    channels, sizes, stride, *shape = BLOCKS[name]
    x = torch.randn(shape[0], channels, *shape[1:]).contiguous(memory_format=torch.channels_last).requires_grad_()
    layers, before = [], channels
    for size in sizes:
        layers.append(frozen(before, *size))
        before = size[0]
    return x, layers, None if stride is None else frozen(channels, before, 1, stride, 0, 1)


def weights_of(layers: list[FrozenConv], shortcut: FrozenConv | None) -> list[Tensor]:
    return [layer.weight for layer in (*layers, shortcut) if layer is not None]


def opened(x: Tensor, layers: list[FrozenConv], shortcut: FrozenConv | None, backend: str) -> list[Tensor]:
    """Which numbers pass each ReLU, as the backend's rounding decides it."""
    maps = [x]
    for layer in layers[:-1]:
        outs, channels = layer.weight.shape[:2]
        nothing = FrozenConv(torch.zeros(outs, channels, 1, 1), torch.zeros(outs), torch.zeros(outs), layer.stride)
        maps.append(residual_block(maps[-1], [layer], nothing, backend=backend))
    maps.append(residual_block(x, layers, shortcut, backend=backend))
    return [y > 0 for y in maps[1:]]


def linear(
    x: Tensor, layers: list[FrozenConv], shortcut: FrozenConv | None, opens: list[Tensor], grad: Tensor
) -> list[Tensor]:
    """Result and gradients in the dtype of ``grad``, where it is known what passes each ReLU."""

    def normed(layer: FrozenConv, x: Tensor) -> Tensor:
        y = F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation)
        return y * layer.scale[:, None, None] + layer.shift[:, None, None]

    def cast(layer: FrozenConv) -> FrozenConv:
        weight = layer.weight.detach().to(grad.dtype).requires_grad_()
        return layer._replace(weight=weight, scale=layer.scale.to(grad.dtype), shift=layer.shift.to(grad.dtype))

    x = x.detach().to(grad.dtype).requires_grad_()
    layers, shortcut = [cast(layer) for layer in layers], shortcut and cast(shortcut)
    y = x
    for layer, passes in zip(layers[:-1], opens[:-1], strict=True):
        y = normed(layer, y) * passes
    y = (normed(layers[-1], y) + (x if shortcut is None else normed(shortcut, x))) * opens[-1]
    return [y.detach(), *torch.autograd.grad(y, [x, *weights_of(layers, shortcut)], grad)]


def assert_close(name: str, found: Tensor, expected: Tensor, of_sums: Tensor) -> None:
    """Winograd's algorithm has twice the error of sums in float32; that of few numbers scatters.

    A single number of a large map may be further off, by 1.7e-5 of the root mean square as csrc/cpu/winograd_lines.h
    tells of the largest; the root mean square of the errors is what shows a lost digit.
    """
    assert found.shape == expected.shape and found.dtype == torch.float32
    if expected.numel() == 0:
        return
    scale = expected.square().mean().sqrt().clamp_min(1e-3)
    error, error_of_sums = ((found - expected) / scale).abs(), ((of_sums - expected) / scale).abs()
    times = 2.5 if expected.numel() > 100_000 else 5
    assert error.max() < times * error_of_sums.max() + 1.7e-5, (name, error.max(), error_of_sums.max())
    rms, rms_of_sums = (e.square().mean().sqrt() for e in (error, error_of_sums))
    assert rms < times * rms_of_sums + 6e-7, (name, rms, rms_of_sums)


@needs_native
@pytest.mark.parametrize("name", BLOCKS)
def test_native_values_and_gradients_at_every_width(name: str, vector_bytes: int) -> None:
    check(name, "native")


@pytest.mark.parametrize("name", BLOCKS)
def test_reference_values_and_gradients(name: str) -> None:
    check(name, "reference")


def check(name: str, backend: str) -> None:
    x, layers, shortcut = case(name)
    opens = opened(x, layers, shortcut, backend)
    assert not opens[-1].numel() or name == "one pixel" or 0.1 < opens[-1].double().mean() < 0.9
    y = residual_block(x, layers, shortcut, backend=backend)
    grad = torch.randn_like(y)
    found = [y.detach(), *torch.autograd.grad(y, [x, *weights_of(layers, shortcut)], grad)]
    exact, of_sums = (linear(x, layers, shortcut, opens, grad.to(dtype)) for dtype in (torch.float64, torch.float32))
    names = ["y", "x", *(f"weight {i}" for i in range(len(found) - 2))]
    for part, *tensors in zip(names, found, exact, of_sums, strict=True):
        assert_close(part, *tensors)


def test_reference_gradients_by_differences() -> None:
    x, layers, _ = case("one layer, odd channels")
    layer = layers[0]._replace(scale=layers[0].scale.double(), shift=layers[0].shift.double())

    def block(x: Tensor, weight: Tensor) -> Tensor:
        return residual_block(x, [layer._replace(weight=weight)], backend="reference")

    assert torch.autograd.gradcheck(block, (x.detach().double().requires_grad_(), layer.weight.detach().double()))


@needs_native
@pytest.mark.parametrize("name", ["bottleneck", "basic, first"])
def test_recording_changes_the_result_by_rounding(name: str) -> None:
    x, layers, shortcut = case(name)
    recorded = residual_block(x, layers, shortcut, backend="native")
    with torch.no_grad():
        alone = residual_block(x, layers, shortcut, backend="native")
    assert recorded.requires_grad and not alone.requires_grad
    torch.testing.assert_close(recorded.detach(), alone, rtol=1e-4, atol=1e-4)
    assert recorded.is_contiguous(memory_format=torch.channels_last)


@needs_native
def test_only_what_asks_for_a_gradient_gets_one() -> None:
    x, layers, shortcut = case("bottleneck, first")
    assert shortcut is not None
    y = residual_block(x, layers, shortcut, backend="native")
    grad = torch.randn_like(y)
    whole = torch.autograd.grad(y, [x, *weights_of(layers, shortcut)], grad)
    layers[1].weight.requires_grad_(False)
    shortcut.weight.requires_grad_(False)
    y = residual_block(x.detach(), layers, shortcut, backend="native")
    y.backward(grad.contiguous(), retain_graph=True)
    y.backward(grad)  # in any layout, and as often as it is asked for
    assert layers[1].weight.grad is None and shortcut.weight.grad is None
    torch.testing.assert_close(layers[0].weight.grad, 2 * whole[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layers[2].weight.grad, 2 * whole[3], rtol=1e-5, atol=1e-5)


@needs_native
def test_a_weight_that_changed_before_the_backward_pass_is_noticed() -> None:
    x, layers, shortcut = case("basic")
    y = residual_block(x, layers, shortcut, backend="native")
    with torch.no_grad():
        layers[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_native
def test_maps_and_weights_in_other_layouts_are_copied() -> None:
    x, layers, _ = case("bottleneck")
    expected = residual_block(x, layers, backend="native")
    wide = torch.randn(2, 64, 17, 30)
    wide[..., 5:23] = x.detach()
    others = [layer._replace(weight=layer.weight.to(memory_format=torch.channels_last)) for layer in layers]
    assert torch.equal(residual_block(wide[..., 5:23], others, backend="native"), expected)


def test_other_dtypes_and_autocast_take_the_reference() -> None:
    x, layers, _ = case("basic")
    exact = [FrozenConv(*(tensor.double() for tensor in layer[:3]), *layer[3:]) for layer in layers]
    assert residual_block(x.double(), exact).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(NotImplementedError, match="its native code is for float32, without autocast"):
            residual_block(x, layers, backend="native")
        residual_block(x, layers)


def test_it_can_be_compiled() -> None:
    x, layers, _ = case("bottleneck")
    compiled = torch.compile(lambda x: residual_block(x, layers), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), residual_block(x, layers), rtol=1e-4, atol=1e-4)


def test_bad_input_is_refused() -> None:
    x, layers, _ = case("basic")
    with pytest.raises(ValueError, match="layers must have at least one layer"):
        residual_block(x, [])
    with pytest.raises(ValueError, match=r"x must be \[B, C, H, W\], got \[16, 20, 23\]"):
        residual_block(x[0], layers)
    with pytest.raises(ValueError, match=r"layers must have a weight \[K, 15, R, S\] here, got \[16, 16, 3, 3\]"):
        residual_block(x[:, :15], layers)
    with pytest.raises(ValueError, match=r"shortcut must have a weight \[K, 16, R, S\] here, got \[16, 8, 1, 1\]"):
        residual_block(x, layers, frozen(8, 16, 1, 1, 0, 1))
    with pytest.raises(ValueError, match=r"must give maps of one size, got \[16, 20, 23\] and \[16, 10, 12\]"):
        residual_block(x, layers, frozen(16, 16, 1, 2, 0, 1))
    with pytest.raises(ValueError, match=r"layers must have a scale \[16\] without a gradient, got \[3\]"):
        residual_block(x, [layers[0]._replace(scale=torch.ones(3)), layers[1]])
    with pytest.raises(ValueError, match="x must be at least as large as the kernels of layers"):
        residual_block(x[:, :, :2], [layers[0]._replace(padding=0), layers[1]])
    with pytest.raises(ValueError, match="layers must be torch.float32 on cpu, as x is, got torch.float64"):
        residual_block(x, [layers[0]._replace(weight=layers[0].weight.double()), layers[1]])
    with pytest.raises(ValueError, match="backend of residual_block must be None or one of"):
        residual_block(x, layers, backend="cudnn")
