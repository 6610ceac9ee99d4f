"""The assignment problems of all images of all decoder layers: the native solver against SciPy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.bench_matching import cost_of_image, inputs
from benchmarks.harness import Contest, Contestant
from benchmarks.shapes import MATCHING_SHAPES, Shape
from detr_fast.ops import assignment

Race = Callable[[str, str, Callable[[], Contest]], None]


BACKENDS = ("reference", "native")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", MATCHING_SHAPES, ids=lambda shape: shape.name)
def test_assignment(race: Race, shape: Shape, backend: str) -> None:
    reason = why_not(backend)
    if reason is not None:
        pytest.skip(reason)
    race(f"assignment {shape.name}", backend, lambda: contest(shape))


def why_not(backend: str) -> str | None:
    """The reason why a backend cannot run here, or None."""
    try:
        assignment(torch.zeros(1, 1, 1), [1], backend=backend)
    except NotImplementedError as error:
        return str(error)
    return None


def contest(shape: Shape) -> Contest:
    """The backends that run here on the costs of a batch; the reference is SciPy, as in the original."""
    cost, counts = costs(shape)

    def contestant(backend: str) -> Contestant:
        return Contestant(backend, lambda: assignment(cost, counts, backend=backend))

    contestants = [contestant(backend) for backend in BACKENDS if why_not(backend) is None]
    expected = contestants[0].run()
    return Contest(contestants, lambda queries: check_indices(queries, expected))


def costs(shape: Shape) -> tuple[Tensor, list[int]]:
    """[P, Q, T] float32 and the number of targets of each of P = L * B problems."""
    layers, targets = inputs(shape)
    counts = [count for _ in layers for count in shape.targets]
    cost = torch.zeros(len(counts), shape.num_queries, max(counts))
    blocks = [cost_of_image(outputs, target, i) for outputs in layers for i, target in enumerate(targets)]
    for problem, block, count in zip(cost, blocks, counts, strict=True):
        problem[:, :count] = block
    return cost, counts


def check_indices(queries: Tensor, expected: Tensor) -> None:
    """Raise unless the indices are SciPy's: the op promises those, ties included."""
    torch.testing.assert_close(queries, expected, rtol=0, atol=0)
