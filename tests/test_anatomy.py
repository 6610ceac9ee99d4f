"""The parts of a training step: they are timed one by one, and both ways compute the same."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import bench_data, bench_train_step, matrix_products, where
from benchmarks.anatomy import Clock, timings_of_parts
from benchmarks.harness import WrongResult, refuse_unless_right
from benchmarks.shapes import PHOTOGRAPHS


def test_a_clock_tells_the_parts_apart() -> None:
    clocks = {name: Clock() for name in ("slow", "fast")}

    def call(clock: Clock, seconds: float) -> None:
        clock.start()
        for part in ("first", "second", "first"):
            time.sleep(seconds)
            clock.mark(part)

    call(clocks["slow"], 0.0)
    assert clocks["slow"].calls == [], "it stands until it is set going"
    runs = {
        "slow": (clocks["slow"], lambda: call(clocks["slow"], 0.01)),
        "fast": (clocks["fast"], lambda: call(clocks["fast"], 0.001)),
    }
    parts = timings_of_parts(runs, rounds=2)
    assert list(parts) == ["first", "second"]
    slow, fast = parts["first"]
    assert (slow.name, fast.name, len(slow.seconds)) == ("slow", "fast", 2)
    assert slow.median >= 0.02 > parts["second"][0].median >= 0.01
    assert slow.ratio == 1 < fast.ratio
    assert not clocks["slow"].running


def test_both_ways_of_a_training_step_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(bench_train_step, "timings_of_parts", partial(timings_of_parts, rounds=2))
    contest = bench_train_step.contest(bench_train_step.CHECKED)
    for contestant in contest.contestants:
        refuse_unless_right(contestant, contest.check)
    assert contest.parts is not None
    parts = contest.parts()
    assert list(parts)[-1] == "(data, in another process)" and "(matcher alone)" in parts
    assert {"backbone", "transformer", "matcher and criterion", "backward, backbone", "optimizer"} < set(parts)
    assert all([row.name for row in rows] == ["original", "detr_fast"] for rows in parts.values())
    (floor,) = contest.floors
    floor.run()
    step = contest.contestants[1].run()
    step.criterion.weight_dict["loss_giou"] = 2.1
    with pytest.raises(WrongResult, match="detr_fast is wrong, so no speed is given"):
        refuse_unless_right(contest.contestants[1], contest.check)


def test_the_floor_does_as_many_operations_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_products, "SIDE", 32)
    # Two whole products and one of 5 rows; a row is 2 * 32 * 32 operations.
    operations = (2 * 32 + 5) * 2 * 32 * 32
    assert matrix_products.flops_of(matrix_products.floor(operations).run) == operations


def test_both_ways_of_loading_agree() -> None:
    shape = replace(PHOTOGRAPHS[1], size=(640, 480), shortest=100)
    contest = bench_data.contest(shape)
    for contestant in contest.contestants:
        refuse_unless_right(contestant, contest.check)
    original, ours = (contestant.run() for contestant in contest.contestants)
    assert original.shape == (2, 3, 100, 133) and not torch.equal(original, ours)
