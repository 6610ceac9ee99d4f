"""The feed-forward network against its layers one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detr_fast.models.feed_forward import ACTIVATIONS, feed_forward, linear_layers
from detr_fast.ops.dropout import Dropout, keep_mask


def layers(activation: str) -> tuple[nn.Linear, nn.Linear]:
    return linear_layers(16, 64, activation)


@pytest.mark.parametrize("shape", [(7, 16), (3, 5, 16), (0, 16)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_its_layers_one_by_one(activation: str, shape: tuple[int, ...]) -> None:
    linear1, linear2 = layers(activation)
    x = torch.randn(shape, requires_grad=True)
    expected = linear2(ACTIVATIONS[activation](linear1(x)))
    found = feed_forward(x, linear1, linear2, ACTIVATIONS[activation])
    torch.testing.assert_close(found, expected)
    inputs, grad = (x, *linear1.parameters(), *linear2.parameters()), torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, inputs, grad) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_drops_between_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    linear1, linear2 = layers("relu")
    dropout = Dropout.draw(0.4, torch.device("cpu"))
    monkeypatch.setattr(Dropout, "draw", lambda p, device: dropout._replace(p=p))
    x = torch.randn(3, 5, 16, requires_grad=True)
    hidden = F.relu(linear1(x)) * keep_mask(dropout, 15, 64).view(3, 5, 64) * dropout.scale
    expected, found = linear2(hidden), feed_forward(x, linear1, linear2, F.relu, 0.4)
    torch.testing.assert_close(found, expected)
    inputs, grad = (x, *linear1.parameters(), *linear2.parameters()), torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, inputs, grad) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_keeps_the_mean(activation: str) -> None:
    linear1, linear2 = layers(activation)
    x = torch.randn(1, 16).expand(4000, 16)
    with torch.no_grad():
        found, expected = (
            feed_forward(x, linear1, linear2, ACTIVATIONS[activation], 0.5),
            feed_forward(x, linear1, linear2, ACTIVATIONS[activation]),
        )
    assert not torch.equal(found[0], found[1])
    deviation = found.std(0) / len(x) ** 0.5
    assert ((found.mean(0) - expected[0]).abs() < 6 * deviation + 1e-6).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_under_autocast(activation: str) -> None:
    linear1, linear2 = layers(activation)
    x = torch.randn(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = feed_forward(x, linear1, linear2, ACTIVATIONS[activation], 0.1)
        assert found.dtype == torch.bfloat16 and found.shape == x.shape
