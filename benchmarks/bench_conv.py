"""The convolutions of ResNet-50 at 800x1066, each with bias, residual and ReLU, and its stem.

``torch nchw`` is how the original runs them, ``torch`` the same with maps channels last. Torch allocates its result at
every call, where it faults the pages of a large one in, unless MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are
high; the native ones write to the same memory again. The floor multiplies and adds in registers as often as direct
convolution does, so that a layer's share of it is its share of the machine's peak; the GFLOP are in the layer's name.
With ``ONEDNN_MAX_CPU_ISA=AVX2`` in the environment everybody is limited to AVX2.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Contest, Contestant
from benchmarks.marks import marked
from benchmarks.shapes import RESNET50_LAYERS, RESNET50_STEM, ConvShape
from detr_fast.ops import PackedConv, _native, conv, conv_max_pool
from detr_fast.ops.conv.native import ALGORITHMS

Race = Callable[[str, str, Callable[[], Contest]], None]
if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2" and _native.load().module is not None:
    _native.module().limit_vector_bytes(32)
CONTESTANTS = ("torch nchw", "torch", *ALGORITHMS)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("shape", marked(RESNET50_LAYERS, lambda shape: not shape.name.startswith("layer3")))
def test_layer(race: Race, shape: ConvShape, contestant: str) -> None:
    if contestant == "winograd" and not shape.takes_winograd:
        pytest.skip("Winograd's algorithm is for 3x3 kernels with stride 1 and no dilation")
    race(f"conv {shape.name} {shape.gflop:.2f} GFLOP", contestant, lambda: layer(shape))


@pytest.mark.parametrize("contestant", ["torch nchw", "torch", "native"])
def test_stem(race: Race, contestant: str) -> None:
    race(f"conv_max_pool {RESNET50_STEM.name} {RESNET50_STEM.gflop:.2f} GFLOP", contestant, lambda: stem(RESNET50_STEM))


def inputs(shape: ConvShape) -> tuple[Tensor, PackedConv, Tensor | None]:
    """A map, a layer, and what is added to its result; of the size that activations and weights have in a network."""
    torch.manual_seed(0)
    x = torch.randn(1, shape.channels, *shape.size).relu().contiguous(memory_format=torch.channels_last)
    kernel = shape.kernel
    weight = torch.randn(shape.out_channels, shape.channels, kernel, kernel) / (shape.channels * kernel**2) ** 0.5
    place = {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation}
    packed = PackedConv.of(weight, torch.randn(shape.out_channels), **place)
    out_size = (1, shape.out_channels, *packed.out_size(*shape.size))
    residual = torch.randn(out_size).contiguous(memory_format=torch.channels_last) if shape.residual else None
    return x, packed, residual


def layer(shape: ConvShape) -> Contest:
    """One layer by torch in both layouts, and by every native algorithm that can."""
    x, packed, residual = inputs(shape)
    expected = exact(x, packed, residual)
    out = torch.empty_like(expected, dtype=torch.float32, memory_format=torch.channels_last)
    algorithms = [a for a in ALGORITHMS if a != "winograd" or shape.takes_winograd]

    def native(algorithm: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return conv(x, packed, residual=residual, relu=True, out=out, algorithm=algorithm, backend="native")

        return run

    contestants = [
        Contestant("torch nchw", by_torch(x, packed, residual, torch.contiguous_format)),
        Contestant("torch", by_torch(x, packed, residual, torch.channels_last)),
        *(Contestant(algorithm, native(algorithm)) for algorithm in algorithms),
    ]
    return Contest(contestants, lambda y: check(y, expected), floors=[floor(shape)])


def by_torch(
    x: Tensor, packed: PackedConv, residual: Tensor | None, layout: torch.memory_format
) -> Callable[[], Tensor]:
    x, weight = x.contiguous(memory_format=layout), packed.weight.contiguous(memory_format=layout)
    added = None if residual is None else residual.contiguous(memory_format=layout)

    def run() -> Tensor:
        with torch.no_grad():
            y = F.conv2d(x, weight, packed.bias, packed.stride, packed.padding, packed.dilation)
            return y.relu_() if added is None else y.add_(added).relu_()

    return run


def stem(shape: ConvShape) -> Contest:
    """From an image as it is loaded, [3, H, W]."""
    x, packed, _ = inputs(shape)
    x = x.contiguous()
    expected = F.max_pool2d(exact(x, packed, None), 3, 2, 1)
    out = torch.empty_like(expected, dtype=torch.float32, memory_format=torch.channels_last)

    def pooled(layout: torch.memory_format) -> Callable[[], Tensor]:
        weight = packed.weight.contiguous(memory_format=layout)

        def run() -> Tensor:
            with torch.no_grad():
                image = x.contiguous(memory_format=layout)
                y = F.conv2d(image, weight, packed.bias, packed.stride, packed.padding).relu_()
                return F.max_pool2d(y, 3, 2, 1)

        return run

    def native() -> Tensor:
        with torch.no_grad():
            return conv_max_pool(x, packed, out=out, backend="native")

    contestants = [
        Contestant("torch nchw", pooled(torch.contiguous_format)),
        Contestant("torch", pooled(torch.channels_last)),
        Contestant("native", native),
    ]
    return Contest(contestants, lambda y: check(y, expected), floors=[floor(shape)])


def exact(x: Tensor, packed: PackedConv, residual: Tensor | None) -> Tensor:
    assert packed.bias is not None
    bias = packed.bias.double()
    y = F.conv2d(x.double(), packed.weight.double(), bias, packed.stride, packed.padding, packed.dilation)
    return (y if residual is None else y + residual).relu_()


def check(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)


def floor(shape: ConvShape) -> Contestant:
    """As many multiplications and additions on registers, on all threads."""
    rounds = int(shape.gflop * 1e9)
    return Contestant(
        "floor: multiply and add", lambda: _native.module().multiply_and_add_cpu(rounds, torch.get_num_threads())
    )
