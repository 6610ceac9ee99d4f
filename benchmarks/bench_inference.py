"""The whole model in inference, images to boxes, against the original's way and the runtimes that people deploy with.

The floor is the model's floating-point operations as products of 2048 x 2048 matrices, timed in the same turns. Memory
freed by PyTorch is by default given back to the system and mapped again at the next call: ``test_malloc`` has the
original and ours as they are beside each other in processes whose malloc keeps it. What a process needs from its start
on is ``python -m benchmarks.inference_process``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import matrix_products
from benchmarks.harness import Contest, Contestant
from benchmarks.runtimes import WAYS, Run, model_of
from benchmarks.shapes import INFERENCE_SHAPES, SMALL_IMAGE, InferenceShape
from benchmarks.tuned_malloc import NAME, TunedProcess
from detr_fast import Detr

Race = Callable[[str, str, Callable[[], Contest]], None]
RUNTIMES = ("original", "onnxruntime", "openvino", "detr_fast")
# They take their memory from the system themselves.
NOT_COUNTED = ("onnxruntime", "openvino")
# Minutes go by until it is compiled.
COMPILED = ("original", "transformers", "torch.compile", "detr_fast")
PRECISIONS = ("detr_fast", "detr_fast-bf16", "detr_fast-int8")
SMALL = InferenceShape(SMALL_IMAGE)
# Ratios refer to the first.
MALLOCS = ("original, tuned malloc", "detr_fast, tuned malloc", "original", "detr_fast")


@pytest.mark.large
@pytest.mark.parametrize("contestant", RUNTIMES)
@pytest.mark.parametrize("shape", INFERENCE_SHAPES, ids=lambda shape: shape.name)
def test_runtimes(race: Race, shape: InferenceShape, contestant: str) -> None:
    race(f"inference {shape.name}", contestant, lambda: inference(shape, RUNTIMES, 1e-4))


@pytest.mark.large
@pytest.mark.parametrize("contestant", MALLOCS)
def test_malloc(race: Race, contestant: str) -> None:
    shape = InferenceShape()
    race(f"inference under two mallocs {shape.name}", contestant, lambda: inference(shape, MALLOCS, 1e-4))


@pytest.mark.large
@pytest.mark.parametrize("contestant", COMPILED)
def test_pytorch(race: Race, contestant: str) -> None:
    race(f"inference in PyTorch {SMALL.name}", contestant, lambda: inference(SMALL, COMPILED, 1e-4))


@pytest.mark.large
@pytest.mark.parametrize("contestant", PRECISIONS)
@pytest.mark.parametrize("shape", [SMALL, InferenceShape()], ids=lambda shape: shape.name)
def test_fewer_bits(race: Race, shape: InferenceShape, contestant: str) -> None:
    race(f"inference in fewer bits {shape.name}", contestant, lambda: inference(shape, PRECISIONS, 5e-2))


def inference(shape: InferenceShape, ways: tuple[str, ...], tolerance: float) -> Contest:
    """Boxes within ``tolerance`` of the original's."""
    model, images = model_of(shape), torch.randn(shape.batch, 3, *shape.image_size)
    with torch.no_grad():
        runs = {name: run_of(name, shape, model, images) for name in ways if name not in missing()}
        original = WAYS["original"](model, images)
        expected = original(images)[1]
        floor = matrix_products.floor(matrix_products.flops_of(lambda: original(images)))

    def check(boxes: Tensor) -> None:
        torch.testing.assert_close(boxes, expected, rtol=0, atol=tolerance)

    def contestant(name: str, run: Run) -> Contestant:
        # A model keeps the memory of its maps for the next call.
        fresh = partial(fresh_call, name, model, images) if name.startswith("detr_fast") else None
        counted = name not in NOT_COUNTED and not name.endswith(NAME)
        return Contestant(name, partial(boxes_of, run, images), fresh, counted)

    contestants = [contestant(name, run) for name, run in runs.items()]
    return Contest(contestants, check, floors=[floor], skipped={k: v for k, v in missing().items() if k in ways})


def fresh_call(way: str, model: Detr, images: Tensor) -> Callable[[], Tensor]:
    """A call of a way that is made anew."""
    with torch.no_grad():
        return partial(boxes_of, WAYS[way](model, images), images)


def run_of(name: str, shape: InferenceShape, model: Detr, images: Tensor) -> Run:
    """The way of that name, in this process unless its malloc is another."""
    if name.endswith(NAME):
        return TunedProcess(name.removesuffix(NAME), shape, images)
    return WAYS[name](model, images)


@torch.inference_mode()
def boxes_of(run: Run, images: Tensor) -> Tensor:
    """The boxes alone."""
    return run(images)[1]


def missing() -> dict[str, str]:
    """Runtimes that are not installed, and why they do not take part."""
    packages = ("transformers", "onnxruntime", "openvino")
    return {name: f"{name} is not installed" for name in packages if importlib.util.find_spec(name) is None}
