"""The spread of a ratio says where a rerun has it: held against reruns of synthetic machines that drift."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import median

import pytest

from detr_fast.bench.spread import DRIFT, PROCESS, ratio_to, reach

PAIRS = 1000
Noise = Callable[[random.Random, int], list[float]]


def independent(draw: random.Random, rounds: int) -> list[float]:
    return [draw.gauss(0, 1) for _ in range(rounds)]


def disturbed(draw: random.Random, rounds: int) -> list[float]:
    """A round in three takes seven times as long."""
    return [draw.gauss(0, 0.1) - 2 * (draw.random() < 1 / 3) for _ in range(rounds)]


def wandering(draw: random.Random, rounds: int, memory: float = 1.0) -> list[float]:
    """A level that forgets where it was within ``memory`` rounds, and half as much noise."""
    level, keep, values = draw.gauss(0, 1), math.exp(-1 / memory), []
    for _ in range(rounds):
        level = keep * level + math.sqrt(1 - keep**2) * draw.gauss(0, 1)
        values.append(level + draw.gauss(0, 0.5))
    return values


def drifting(draw: random.Random, rounds: int) -> list[float]:
    """Over both runs, which are half of the rounds each, by as much as the noise's deviation."""
    return [draw.gauss(0, 1) + 2 * i / rounds for i in range(rounds)]


def slowly_wandering(draw: random.Random, rounds: int) -> list[float]:
    """As long as a quarter of a run."""
    return wandering(draw, rounds, memory=rounds / 8)


def bursts(draw: random.Random, rounds: int) -> list[float]:
    """Another process comes and goes, for half of a run on average."""
    busy, values = draw.random() < 0.5, []
    for _ in range(rounds):
        busy ^= draw.random() < 4 / rounds
        values.append(draw.gauss(0, 0.2) - busy)
    return values


def coverage(noise: Noise, rounds: int) -> tuple[float, float]:
    """Of pairs of runs that follow each other: how often the second's median is where the first says; how often that
    or the contrary holds, as ``compare`` asks. PROCESS is small beside this noise."""
    draw = random.Random(f"{noise.__name__} {rounds}")
    within = alike = 0
    for _ in range(PAIRS):
        both = noise(draw, 2 * rounds)
        first, second = both[:rounds], both[rounds:]
        there, back = holds(first, second), holds(second, first)
        within, alike = within + there, alike + (there or back)
    return within / PAIRS, alike / PAIRS


def holds(first: list[float], second: list[float]) -> bool:
    middle = median(first)
    below, above = reach([value - middle for value in first])
    return -below <= median(second) - middle <= above


def test_rounds_that_agree_leave_what_processes_differ_by() -> None:
    ratio, (low, high) = ratio_to([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert ratio == 2 and low == pytest.approx(2 * math.exp(-PROCESS)) and high == pytest.approx(2 * math.exp(PROCESS))


def test_the_baseline_is_as_quick_as_itself_in_every_run() -> None:
    seconds = [1.0, 2.0]
    assert ratio_to(seconds, seconds) == (1.0, (1.0, 1.0))


def test_eight_rounds_reach_to_their_extremes_and_fewer_further() -> None:
    deviations = [-0.3, 0.1, -0.1, 0.0, 0.2, 0.0, 0.0, 0.0]  # the halves' medians are 0.05 apart, which counts for less
    assert reach(deviations) == pytest.approx((math.hypot(0.3, PROCESS), math.hypot(0.2, PROCESS)))
    assert reach([-0.1, 0.2, 0.0]) == pytest.approx((math.hypot(2.83 * 0.2, PROCESS),) * 2)


def test_a_drift_reaches_further_than_its_blocks_but_not_far_beyond_what_was_seen() -> None:
    deviations = [i / 15 - 0.5 for i in range(16)]  # the halves' medians are 8 / 15 apart, the next run's 16 / 15
    assert reach(deviations) == pytest.approx((math.hypot(DRIFT * 0.5, PROCESS),) * 2)
    step = [-0.1] * 8 + [0.1] * 8
    assert reach(step) == pytest.approx((math.hypot(DRIFT * 0.1, PROCESS),) * 2)


@pytest.mark.parametrize(("baseline", "seconds"), [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_what_has_no_spread_is_refused(baseline: list[float], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match=f"must be as many durations, two at least, got {len(baseline)}, "):
        ratio_to(baseline, seconds)


# The draws are the same in every run, so that the floors, a little below what was found, cannot fail by chance.
@pytest.mark.parametrize("rounds", [3, 5, 8, 15, 60])
@pytest.mark.parametrize(
    ("noise", "least_within", "least_alike"),
    [
        (independent, 0.94, 0.98),
        (disturbed, 0.87, 0.97),
        (wandering, 0.89, 0.96),
        (slowly_wandering, 0.87, 0.95),
        (bursts, 0.82, 0.93),
        (drifting, 0.70, 0.91),
    ],
)
def test_reruns_lie_within_the_spread(noise: Noise, least_within: float, least_alike: float, rounds: int) -> None:
    within, alike = coverage(noise, rounds)
    assert within >= least_within and alike >= least_alike, f"{within=}, {alike=}"
