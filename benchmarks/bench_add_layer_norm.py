"""Residual, dropout, layer norm and position, of an encoder's tokens and a decoder's queries: the op by backend.

``original`` is ``norm(residual + dropout(x))`` and the position added to it, as the original does it; ``detr_fast`` is
the op where no backend is named. A training step is a forward with dropout 0.1, and a backward of both results to all
inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import where
from benchmarks.harness import Contest, Contestant
from benchmarks.shapes import MIXED_MAPS, ONE_MAP, MapShape
from detr_fast.ops import Dropout, add_layer_norm
from detr_fast.ops.add_layer_norm.api import OP

Race = Callable[[str, str, Callable[[], Contest]], None]
Run = Callable[[float], tuple[Tensor, Tensor]]
DEVICE = where.device()
BACKENDS = tuple(i.name for i in OP.implementations)
COLUMNS, P = 256, 0.1

encoder_and_decoder = pytest.mark.parametrize("part", ["encoder", "decoder"])
maps = pytest.mark.parametrize("shape", [ONE_MAP, MIXED_MAPS], ids=lambda shape: shape.name)
contestants = pytest.mark.parametrize("contestant", ["original", "detr_fast", *BACKENDS])


@contestants
@encoder_and_decoder
@maps
def test_inference(race: Race, shape: MapShape, part: str, contestant: str) -> None:
    skip_unless_it_runs(contestant)
    race(f"add_layer_norm inference {part} {shape.name}", contestant, lambda: inference(rows_of(shape, part)))


@contestants
@encoder_and_decoder
@maps
def test_training(race: Race, shape: MapShape, part: str, contestant: str) -> None:
    skip_unless_it_runs(contestant)
    race(f"add_layer_norm training {part} {shape.name}", contestant, lambda: training(rows_of(shape, part)))


def skip_unless_it_runs(contestant: str) -> None:
    reason = OP.reasons(DEVICE).get(contestant)
    if reason is not None:
        pytest.skip(reason)


def rows_of(shape: MapShape, part: str) -> int:
    """Tokens without padding, or queries, of all images."""
    if part == "encoder":
        return sum(height * width for height, width in shape.cells)
    return len(shape.sizes) * shape.num_queries


def inputs(rows: int) -> list[Tensor]:
    """x, residual, weight, bias, pos."""
    torch.manual_seed(0)
    weight, bias = torch.ones(COLUMNS, device=DEVICE), torch.zeros(COLUMNS, device=DEVICE)
    x, residual, pos = (torch.randn(rows, COLUMNS, device=DEVICE) for _ in range(3))
    return [x, residual, weight, bias, pos]


def runs(tensors: list[Tensor]) -> dict[str, Run]:
    """Every contestant's (y, y + pos) at a probability of dropout."""
    x, residual, weight, bias, pos = tensors

    def original(p: float) -> tuple[Tensor, Tensor]:
        y = F.layer_norm(residual + F.dropout(x, p, p > 0), weight.shape, weight, bias)
        return y, y + pos

    def op(backend: str | None) -> Run:
        def run(p: float) -> tuple[Tensor, Tensor]:
            dropout = Dropout.draw(p, DEVICE) if p > 0 else None
            return add_layer_norm(x, residual, weight, bias, dropout=dropout, pos=pos, backend=backend)

        return run

    able = [name for name, reason in OP.reasons(DEVICE).items() if reason is None]
    return {"original": original, "detr_fast": op(None), **{name: op(name) for name in able}}


def inference(rows: int) -> Contest:
    """All contestants on the same tensors, without gradients."""
    tensors = inputs(rows)
    x, residual, weight, _, pos = (t.double() for t in tensors)
    y = F.layer_norm(residual + x, weight.shape)
    found = [Contestant(name, lambda run=run: run(0.0)) for name, run in runs(tensors).items()]  # type: ignore[misc]
    return Contest(found, lambda result: check_values(result, (y, y + pos)), str(DEVICE))


def check_values(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
    """Raise unless the results are those of float64, to float32 rounding."""
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def training(rows: int) -> Contest:
    """All contestants forward with dropout, and backward."""
    tensors = [t.requires_grad_() for t in inputs(rows)]
    grads = [torch.randn(rows, COLUMNS, device=DEVICE) for _ in range(2)]

    def step(run: Run) -> tuple[Tensor, ...]:
        outputs = run(P)
        return outputs[0], *torch.autograd.grad(outputs, tensors, grads)

    found = [Contestant(name, lambda run=run: step(run)) for name, run in runs(tensors).items()]  # type: ignore[misc]
    return Contest(found, check_training, str(DEVICE))


def check_training(found: tuple[Tensor, ...]) -> None:
    """Raise unless rows are normalized, and a tenth of the gradient of x, and nothing of the residual's, is dropped."""
    y, grad_x, grad_residual, *_ = found
    torch.testing.assert_close(y.mean(-1), torch.zeros_like(y[:, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones_like(y[:, 0]), rtol=0, atol=1e-4)
    dropped = (grad_x == 0).double().mean()
    assert abs(dropped - P) < 0.02, f"{dropped:.3f} of the gradient is dropped"
    kept = grad_x != 0
    torch.testing.assert_close(grad_x[kept] * (1 - P), grad_residual[kept], rtol=1e-4, atol=1e-6)
