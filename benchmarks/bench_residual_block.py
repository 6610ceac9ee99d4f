"""A block of each of ResNet-50's stages in a training step: forward, and backward to its map and its weights.

``original`` is how the original runs them, with frozen batch norms that pass over every map; ``reference`` scales
weights instead. Its maps and those of ``native`` lie channels last, as in our backbone. DETR does not train the first
stage, whose block is here for its size. The floor is the step's operations as products of matrices; Winograd's
algorithm does with fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks import matrix_products, where
from benchmarks.harness import Contest, Contestant
from benchmarks.original_model import Block
from benchmarks.shapes import RESNET50_BLOCKS, BlockShape
from detr_fast.ops import FrozenConv, residual_block
from detr_fast.ops.residual_block.api import OP

Race = Callable[[str, str, Callable[[], Contest]], None]
CONTESTANTS = ("original", "native", "reference")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("shape", RESNET50_BLOCKS, ids=lambda shape: shape.name)
def test_residual_block(race: Race, shape: BlockShape, contestant: str) -> None:
    race(f"residual_block training {shape.name}", contestant, lambda: contest(shape))


def contest(shape: BlockShape) -> Contest:
    """All with the same weights; the result is the map and the gradients."""
    torch.manual_seed(0)
    block = Block(shape.channels, shape.planes, shape.stride, 1).to(where.device())
    x = torch.randn(shape.batch, shape.channels, *shape.size, device=where.device()).relu_()
    grad = torch.randn_like(block(x).detach())
    layers, shortcut = frozen_layers(block)

    def original() -> list[Tensor]:
        return with_gradients(block, x, grad, block)

    def by_op(backend: str) -> Contestant:
        last = {"memory_format": torch.channels_last}
        own_x, own_grad = x.contiguous(**last), grad.contiguous(**last)
        return Contestant(
            backend,
            lambda: with_gradients(
                lambda y: residual_block(y, layers, shortcut, backend=backend), own_x, own_grad, block
            ),
        )

    reasons = OP.reasons(where.device())
    ours = {name: by_op(name) for name, reason in reasons.items() if reason is None}
    flops = matrix_products.flops_of(ours["reference"].run)
    expected = original()
    return Contest(
        [Contestant("original", original), *ours.values()],
        lambda found: check(found, expected),
        str(where.device()),
        floors=[matrix_products.floor(flops, where.device())],
        skipped={name: reason for name, reason in reasons.items() if reason is not None},
    )


def frozen_layers(block: Block) -> tuple[list[FrozenConv], FrozenConv | None]:
    """The block as the op takes it. Its norms are those of a fresh one: of variance 1, and 0 otherwise."""

    def frozen(conv: nn.Module) -> FrozenConv:
        assert isinstance(conv, nn.Conv2d) and isinstance(conv.padding, tuple)
        scale = torch.full((conv.out_channels,), (1 + 1e-5) ** -0.5, device=where.device())
        return FrozenConv(conv.weight, scale, torch.zeros_like(scale), conv.stride[0], conv.padding[0])

    down = block.downsample
    shortcut = frozen(down[0]) if isinstance(down, nn.Sequential) else None
    return [frozen(conv) for conv in (block.conv1, block.conv2, block.conv3)], shortcut


def with_gradients(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, block: Block) -> list[Tensor]:
    """The map, and the gradients of ``x`` and of all weights."""
    x = x.detach().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], grad)]


def check(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise unless the errors are small beside the numbers: a ReLU within rounding of 0 may fall to either side."""
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < 1e-3, f"result {place} is off by {error:.1e} of its size"
