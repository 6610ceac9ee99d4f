"""Between which values a ratio lies when its contest is held again, from the rounds of one run.

Three things make a second run differ from the first, and each widens the interval.

- Rounds differ. They are cut into eight blocks of neighbours, because rounds that follow each other share what disturbs
  the machine, and each block has a median. In any order of those of both runs each is as likely, so that the middle of
  a second run's eight lies outside of the first run's with 2 sum_{m=0..4} C(7 + m, m) / C(16, 8) = 8 % at most,
  whatever their distribution, and with 5 % where it is normal. Of fewer rounds than blocks the distance to the farthest
  one counts FEW times, in both directions.
- The machine drifts. Where it goes on as it went from the first half to the second, it moves by twice the distance
  between their medians until the same place in the next run. Half as much again, because that distance is itself
  uncertain; but at most as far beyond what was seen.
- Another process has its memory elsewhere: PROCESS.

All in logarithms: a ratio that doubles moves as far as one that halves. On simulated machines (tests/test_bench_spread)
19 of 20 second medians or more lie within where rounds are independent, 9 of 10 where a disturbance lasts for a quarter
of a run, and 5 of 6 where it lasts for half of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

BLOCKS = 8
# By number of rounds: of normally distributed ones, 95 % of second medians lie within so many times that distance.
FEW = {2: 18.0, 3: 2.83, 4: 1.67, 5: 1.25, 6: 1.0, 7: 1.0}
DRIFT = 1.5
# Of 46 ratios measured twice, half a minute apart, 95 % of the second lie within the interval of the first with this.
PROCESS = 0.08


def ratio_to(baseline: Sequence[float], seconds: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """How many times quicker than the baseline, and between which values that lies in 95 % of runs like this one.

    Args:
        baseline: duration of each round, of the contestant that the ratio refers to.
        seconds: those of the same rounds, of the contestant; the baseline itself has the ratio 1 in every run.

    Returns:
        the median of the ratios of each round, (low, high).

    Raises:
        ValueError: there are not as many durations of both, or fewer than two.
    """
    if len(baseline) != len(seconds) or len(seconds) < 2:
        raise ValueError(
            f"baseline and seconds must be as many durations, two at least, got {len(baseline)}, {len(seconds)}"
        )
    if baseline is seconds:
        return 1.0, (1.0, 1.0)
    ratios = [theirs / ours for theirs, ours in zip(baseline, seconds, strict=True)]
    middle = median(ratios)
    below, above = reach([math.log(ratio / middle) for ratio in ratios])
    return middle, (middle * math.exp(-below), middle * math.exp(above))


def reach(deviations: Sequence[float]) -> tuple[float, float]:
    """How far below and above zero the median of a second run may lie.

    Args:
        deviations: of each round from the median of all, in logarithms.
    """
    half = len(deviations) // 2
    apart = abs(median(deviations[-half:]) - median(deviations[:half])) * len(deviations) / (len(deviations) - half)
    below, above = _between_rounds(deviations)
    return (
        math.hypot(max(below, DRIFT * min(apart, -min(deviations))), PROCESS),
        math.hypot(max(above, DRIFT * min(apart, max(deviations))), PROCESS),
    )


def _between_rounds(deviations: Sequence[float]) -> tuple[float, float]:
    rounds = len(deviations)
    if rounds in FEW:
        farthest = FEW[rounds] * max(-min(deviations), max(deviations))
        return farthest, farthest
    cuts = [round(block * rounds / BLOCKS) for block in range(BLOCKS + 1)]
    blocks = [median(deviations[start:end]) for start, end in zip(cuts, cuts[1:], strict=False)]
    return max(0.0, -min(blocks)), max(0.0, max(blocks))
