"""The criterion, matching included: forward, the weighted sum of a training loop, and backward to the predictions.

``detr_fast`` is SetCriterion in the original's place and in the original's loop; ``total`` is the same criterion with
its own weighted sum (``SetCriterion.total``); ``reference`` is ``detr_fast`` where nothing was compiled. The floors
are the matching's.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import original_criterion, where
from benchmarks.bench_matching import floors, inputs
from benchmarks.harness import Contest, Contestant
from benchmarks.shapes import LOSS_SHAPES, Shape
from detr_fast import HungarianMatcher, SetCriterion
from detr_fast.ops import _native

Race = Callable[[str, str, Callable[[], Contest]], None]
Layers = list[dict[str, Tensor]]
CONTESTANTS = ("original", "detr_fast", "total", "reference")
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
WEIGHTS |= {f"{name}_{number}": weight for name, weight in WEIGHTS.items() for number in range(5)}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=lambda shape: shape.name)
def test_loss(race: Race, shape: Shape, contestant: str) -> None:
    race(f"loss {shape.name}", contestant, lambda: contest(shape))


def contest(shape: Shape) -> Contest:
    """All contestants on the same predictions, which are leaves: their gradients are the result."""
    layers, targets = inputs(shape)
    for layer in layers:
        for prediction in layer.values():
            prediction.requires_grad_()
    criterion = SetCriterion(
        shape.num_classes, HungarianMatcher(1, 5, 2), WEIGHTS, 0.1, ["labels", "boxes", "cardinality"]
    ).to(where.device())
    outputs = layers[-1] | {"aux_outputs": layers[:-1]}

    def original_way() -> list[Tensor]:
        losses = original_criterion.losses_of_layers(layers, targets, criterion.empty_weight)
        return gradients(weighted_sum(losses), layers)

    def our_way() -> list[Tensor]:
        return gradients(weighted_sum(criterion(outputs, targets)), layers)

    def with_total() -> list[Tensor]:
        return gradients(criterion.total(criterion(outputs, targets)), layers)

    def by_references() -> list[Tensor]:
        with mock.patch.object(_native, "load", lambda: _native.Native(None, "left out")):
            return our_way()

    expected = original_way()
    ways = (original_way, our_way, with_total, by_references)
    return Contest(
        [Contestant(name, way) for name, way in zip(CONTESTANTS, ways, strict=True)],
        lambda found: torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6),
        str(where.device()),
        floors=floors([layer["pred_logits"].detach() for layer in layers]),
    )


def weighted_sum(losses: dict[str, Tensor]) -> Tensor:
    """As in the original's loop."""
    return sum(losses[name] * WEIGHTS[name] for name in losses if name in WEIGHTS)  # type: ignore[return-value]


def gradients(total: Tensor, layers: Layers) -> list[Tensor]:
    """Total loss, and the gradients of all predictions, which are then forgotten."""
    total.backward()
    predictions = [prediction for layer in layers for prediction in layer.values()]
    found = [total.detach(), *(prediction.grad for prediction in predictions if prediction.grad is not None)]
    for prediction in predictions:
        prediction.grad = None
    return found
