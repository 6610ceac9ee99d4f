"""The feed-forward network of an encoder's tokens and a decoder's queries, against its layers one by one.

A training step is a forward with dropout 0.1, and a backward to the input and all parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_add_layer_norm import DEVICE, encoder_and_decoder, maps, rows_of
from benchmarks.harness import Contest, Contestant
from benchmarks.shapes import MapShape
from detr_fast.models.feed_forward import feed_forward, linear_layers

Race = Callable[[str, str, Callable[[], Contest]], None]
Run = Callable[[float], Tensor]
COLUMNS, INNER_COLUMNS, P = 256, 2048, 0.1

contestants = pytest.mark.parametrize("contestant", ["original", "detr_fast"])


@contestants
@encoder_and_decoder
@maps
def test_inference(race: Race, shape: MapShape, part: str, contestant: str) -> None:
    race(f"feed_forward inference {part} {shape.name}", contestant, lambda: contest(rows_of(shape, part), False))


@contestants
@encoder_and_decoder
@maps
def test_training(race: Race, shape: MapShape, part: str, contestant: str) -> None:
    race(f"feed_forward training {part} {shape.name}", contestant, lambda: contest(rows_of(shape, part), True))


def contest(rows: int, training: bool) -> Contest:
    """Both with the same weights; each result is that without dropout, and in training the gradients with it."""
    torch.manual_seed(0)
    x = torch.randn(rows, COLUMNS, device=DEVICE, requires_grad=training)
    linear1, linear2 = (layer.to(DEVICE) for layer in linear_layers(COLUMNS, INNER_COLUMNS, "relu"))
    wanted = [x, *linear1.parameters(), *linear2.parameters()]
    grad = torch.randn(rows, COLUMNS, device=DEVICE)
    p = P if training else 0.0

    def original() -> Tensor:
        return linear2(F.dropout(F.relu(linear1(x)), p, training))

    def ours() -> Tensor:
        return feed_forward(x, linear1, linear2, F.relu, p)

    def run(forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(training):
            y = forward()
            return (y, *torch.autograd.grad(y, wanted, grad)) if training else (y,)

    with torch.no_grad():
        expected = linear2(F.relu(linear1(x)))
    found = [Contestant("original", lambda: run(original)), Contestant("detr_fast", lambda: run(ours))]
    return Contest(found, lambda result: check(result, expected, training), str(DEVICE))


def check(found: tuple[Tensor, ...], expected: Tensor, training: bool) -> None:
    """Raise unless the result is that without dropout, to rounding or, in training, in the mean over the rows."""
    y = found[0].detach()
    if not training:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        return
    deviation = (y - expected).std(0) / len(y) ** 0.5
    assert ((y - expected).mean(0).abs() < 6 * deviation).all(), "dropout moves the mean"
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in found[1:])
