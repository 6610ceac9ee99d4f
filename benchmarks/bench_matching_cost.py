"""The matching costs of all decoder layers of a batch: the op by backend, against the original way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import original, where
from benchmarks.bench_matching import WEIGHTS, cost_of_image, inputs
from benchmarks.harness import Contest, Contestant
from benchmarks.shapes import MATCHING_SHAPES, Shape
from detr_fast.ops import PackedTargets, matching_cost
from detr_fast.ops.matching_cost.api import OP

Race = Callable[[str, str, Callable[[], Contest]], None]


@pytest.mark.parametrize("contestant", ["original", *(i.name for i in OP.implementations)])
@pytest.mark.parametrize("shape", MATCHING_SHAPES, ids=lambda shape: shape.name)
def test_matching_cost(race: Race, shape: Shape, contestant: str) -> None:
    race(f"matching_cost {shape.name}", contestant, lambda: contest(shape))


def contest(shape: Shape) -> Contest:
    """All contestants on the same predictions, all layers of them."""
    layers, targets = inputs(shape)
    logits, boxes = [x["pred_logits"] for x in layers], [x["pred_boxes"] for x in layers]
    packed = PackedTargets.pack(targets)
    reasons = OP.reasons(where.device())

    def op(backend: str) -> Contestant:
        return Contestant(backend, lambda: matching_cost(logits, boxes, packed, WEIGHTS, backend=backend).cost)

    expected = torch.stack(
        [torch.cat([cost_of_image(x, target, i).T for i, target in enumerate(targets)]) for x in layers]
    )
    return Contest(
        [
            Contestant("original", lambda: [original.all_pairs_cost(outputs, targets) for outputs in layers]),
            *(op(backend) for backend, reason in reasons.items() if reason is None),
        ],
        lambda cost: check_cost(cost, shape, expected),
        str(where.device()),
        skipped={name: reason for name, reason in reasons.items() if reason is not None},
    )


def check_cost(cost: Tensor | list[Tensor], shape: Shape, expected: Tensor) -> None:
    """Raise unless the costs are those of float64, [L, N, Q], to float32 rounding of terms of a size of about ten."""
    found = cost if isinstance(cost, Tensor) else torch.stack([own_blocks(layer, shape) for layer in cost])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def own_blocks(cost: Tensor, shape: Shape) -> Tensor:
    """[B, Q, N] of all pairs to [N, Q]: of each target the queries of its own image."""
    return torch.cat([block[image].T for image, block in enumerate(cost.split(shape.targets, -1))])
