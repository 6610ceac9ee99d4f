"""The matching costs of all decoder layers of a batch: the op by backend, against the original way.

With the softmax's probabilities, and with the focal term of later models, whose original way computes that of all
classes before it picks the targets'.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import original, where
from benchmarks.bench_matching import WEIGHTS, cost_of_image, inputs
from benchmarks.harness import Contest, Contestant
from benchmarks.marks import marked
from benchmarks.shapes import FOCAL_SHAPES, MATCHING_SHAPES, Shape
from detr_fast.ops import PackedTargets, matching_cost
from detr_fast.ops.matching_cost.api import OP

Race = Callable[[str, str, Callable[[], Contest]], None]


@pytest.mark.parametrize("contestant", ["original", *(i.name for i in OP.implementations)])
@pytest.mark.parametrize("shape", marked(MATCHING_SHAPES, lambda shape: shape.num_queries > 100))
def test_matching_cost(race: Race, shape: Shape, contestant: str) -> None:
    race(f"matching_cost {shape.name}", contestant, lambda: contest(shape))


@pytest.mark.parametrize("contestant", ["original", *(i.name for i in OP.implementations)])
@pytest.mark.parametrize("shape", marked(FOCAL_SHAPES, lambda shape: shape.num_queries > 100))
def test_matching_cost_focal(race: Race, shape: Shape, contestant: str) -> None:
    race(f"matching_cost focal {shape.name}", contestant, lambda: contest(shape, focal=True))


def contest(shape: Shape, *, focal: bool = False) -> Contest:
    """All contestants on the same predictions, all layers of them."""
    layers, targets = inputs(shape)
    logits, boxes = [x["pred_logits"] for x in layers], [x["pred_boxes"] for x in layers]
    packed = PackedTargets.pack(targets)
    reasons = OP.reasons(where.device())

    def op(backend: str) -> Contestant:
        return Contestant(backend, lambda: matching_cost(logits, boxes, packed, weights, backend=backend).cost)

    weights, class_cost = WEIGHTS._replace(focal=focal), focal_cost if focal else original.softmax_cost
    expected = torch.stack(
        [torch.cat([cost_of_image(x, target, i, class_cost).T for i, target in enumerate(targets)]) for x in layers]
    )
    return Contest(
        [
            Contestant(
                "original", lambda: [original.all_pairs_cost(outputs, targets, class_cost) for outputs in layers]
            ),
            *(op(backend) for backend, reason in reasons.items() if reason is None),
        ],
        lambda cost: check_cost(cost, shape, expected),
        str(where.device()),
        skipped={name: reason for name, reason in reasons.items() if reason is not None},
    )


def focal_cost(logits: Tensor) -> Tensor:
    """[queries, classes], the focal loss of a class being there less that of it not being there; gamma 2."""
    p = logits.sigmoid()
    there = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    absent = 0.75 * p**2 * -(1 - p + 1e-8).log()
    return there - absent


def check_cost(cost: Tensor | list[Tensor], shape: Shape, expected: Tensor) -> None:
    """Raise unless the costs are those of float64, [L, N, Q], to float32 rounding of terms of a size of about ten."""
    found = cost if isinstance(cost, Tensor) else torch.stack([own_blocks(layer, shape) for layer in cost])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def own_blocks(cost: Tensor, shape: Shape) -> Tensor:
    """[B, Q, N] of all pairs to [N, Q]: of each target the queries of its own image."""
    return torch.cat([block[image].T for image, block in enumerate(cost.split(shape.targets, -1))])
