"""Data-parallel training on two gloo processes of one machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_worker import (
    Case,
    gradients,
    mask_gradients,
    not_finite,
    refused,
    resumed,
    run_cases,
    stopped,
    trained,
)
from small import small_detr, small_segm
from torch import Tensor
from training_data import samples

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert max(value.abs().max() for value in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


# Objects per image, two images a process. Cross-entropy is normalised per process, so its gradient is that of the
# joined batch only where the processes have as many targets; num_boxes is averaged over them, so the box losses' is.
EQUAL_COUNTS = {"equal": [3, 1, 2, 2], "no targets at all": [0, 0, 0, 0]}
ANY_COUNTS = {"unequal": [3, 1, 0, 1], "no targets on one process": [0, 0, 2, 1], "one target": [1, 0, 0, 0]}


# With masks: one process has none, and its mask head must answer all the same.
MASK_COUNTS = {"masks": [2, 1, 3, 0], "no masks on one process": [0, 0, 2, 1], "no masks at all": [0, 0, 0, 0]}


def random_masks(count: int, side: int = 32) -> Tensor:
    return torch.rand(count, side, side) > torch.rand(count, 1, 1)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    print("seed", torch.seed())
    found = {}
    for name, counts in {**EQUAL_COUNTS, **ANY_COUNTS}.items():
        data = samples(counts)
        settings = {"weights": small_detr().state_dict(), "ce": 1.0 if name in EQUAL_COUNTS else 0.0}
        found[name] = Case(gradients, [data[:2], data[2:]], settings)
    for name, counts in MASK_COUNTS.items():
        data = [(image, {**target, "masks": random_masks(len(target["labels"]))}) for image, target in samples(counts)]
        found[name] = Case(mask_gradients, [data[:2], data[2:]], {"weights": small_segm().state_dict(), "ce": 0.0})
    data = samples([2] * 4)
    accumulating = {"weights": small_detr().state_dict(), "ce": 1.0, "accumulate": 2}
    found["accumulating"] = Case(gradients, [data[:2], data[2:]], accumulating)
    data = samples([1, 0, 0, 0, 0, 0, 4, 2])
    found["trained"] = Case(trained, [data[:4], data[4:]], {"epochs": 3})
    found["resumed"] = Case(resumed, [data[:4], data[4:]])
    data = samples([1] * 16)
    found["refused"] = Case(refused, [data[:4], data[4:]])
    found["not finite"] = Case(not_finite, [data[:4], data[4:8]], {"bad": 107})
    found["stopped"] = Case(stopped, [data[:8], data[8:]], {"stopping": 1})
    return found


@pytest.fixture(scope="module")
def results(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases(tmp_path_factory.mktemp("processes"), cases)


def joined(case: Case) -> dict[str, Tensor]:
    """The gradient of one process with all processes' samples as one batch."""
    return gradients(case.shares[0] + case.shares[1], weights=case.settings["weights"], ce=case.settings["ce"])


@pytest.mark.parametrize("name", [*EQUAL_COUNTS, "unequal", "no targets on one process", "accumulating"])
def test_gradients_are_those_of_the_joined_batch(name: str, cases: dict[str, Case], results: list[Any]) -> None:
    expected = joined(cases[name])
    for found in results:
        assert_same_gradients(found[name], expected)


@pytest.mark.parametrize("name", MASK_COUNTS)
def test_gradients_of_the_mask_head_are_those_of_the_joined_batch(
    name: str, cases: dict[str, Case], results: list[Any]
) -> None:
    case = cases[name]
    expected = mask_gradients(case.shares[0] + case.shares[1], **case.settings)
    parameters = {key for key, _ in small_segm().named_parameters()}
    for found in results:
        assert found[name].keys() == parameters, "a process waits for ever for a parameter without a gradient"
        for key, value in expected.items():
            torch.testing.assert_close(
                found[name][key], value, rtol=1e-6, atol=1e-9, msg=lambda text, k=key: f"{k}: {text}"
            )
    assert (expected["mask_head.lay3.weight"].abs().max() > 1e-5) == any(MASK_COUNTS[name])


def test_fewer_targets_than_processes(cases: dict[str, Case], results: list[Any]) -> None:
    """``num_boxes`` is at least 1 on every process, as in the original: one target on two processes counts half."""
    expected = joined(cases["one target"])
    for found in results:
        assert_same_gradients({name: 2 * value for name, value in found["one target"].items()}, expected)


def test_processes_stay_together(results: list[Any]) -> None:
    one, other = (found["trained"] for found in results)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resuming_is_as_if_never_stopped(results: list[Any]) -> None:
    """Each process has its own random numbers back."""
    for straight, again in (found["resumed"] for found in results):
        assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_a_loss_that_is_not_finite_on_one_process_stops_both(results: list[Any]) -> None:
    (message, step, weights), (other_message, other_step, other_weights) = (found["not finite"] for found in results)
    assert "loss_ce not finite in epoch 0, update 1; image ids of the batch: [106, 107]" in message
    assert (message, step) == (other_message, other_step)
    assert step == 1
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_a_signal_to_one_process_stops_both_together(results: list[Any]) -> None:
    assert [found["stopped"] for found in results] == [(15, 3), (15, 3)]


def test_unequal_numbers_of_batches_are_refused(results: list[Any]) -> None:
    """They would wait for each other for ever."""
    for found in results:
        assert "same number of batches on every process, got [2, 6]" in found["refused"]
