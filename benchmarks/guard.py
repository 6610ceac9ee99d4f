"""Floors under the ratios to the original way, kept in floors.json: a change that makes a contestant slow fails CI.

A floor is a share of a ratio that was measured, so that another machine passes, and a contestant that lost its fast
path does not. On a busy machine some rounds take longer than they need: a contestant is too slow where the median of
its ratios is below the floor and the ratio of the shortest rounds is too, in every one of TRIES contests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness import Contest, Timing

# How often a contest is held before somebody is called too slow, and of how many rounds at least.
TRIES, ROUNDS = 3, 5


@dataclass(frozen=True)
class Floors:
    """What was measured, by contest and contestant, and the share of it that a run must reach."""

    slack: float
    measured: dict[str, dict[str, float]]

    @staticmethod
    def read(file: Path) -> Floors:
        """From a file such as floors.json."""
        content = json.loads(file.read_text())
        return Floors(content["slack"], content["measured"])

    def floor(self, contest: str, contestant: str) -> float | None:
        """The least ratio, or None where none is kept."""
        measured = self.measured.get(contest, {}).get(contestant)
        return None if measured is None else self.slack * measured

    def needed(self, name: str, contest: Contest) -> Contest:
        """The contest without those who have no floor, but for the first."""
        first, *others = contest.contestants
        held = [contestant for contestant in others if contestant.name in self.measured.get(name, {})]
        return replace(contest, contestants=[first, *held], floors=(), parts=None)

    def too_slow(self, contest: str, timings: list[Timing]) -> dict[str, str]:
        """Why a contestant fails, by its name."""
        first = timings[0]
        floors = {timing.name: self.floor(contest, timing.name) for timing in timings}
        return {
            timing.name: f"{contest}: {timing.name} is {timing.ratio:.2f} times as fast as {first.name}, "
            f"the floor is {floor:.2f} ({self.slack:g} of the {floor / self.slack:.2f} that were measured)"
            for timing in timings
            if (floor := floors[timing.name]) is not None
            and max(timing.ratio, min(first.seconds) / min(timing.seconds)) < floor
        }

    def unheld(self, timings: dict[str, list[Timing]]) -> list[str]:
        """Floors under contestants that were not timed, in words."""
        return [
            f"{contest}: {contestant}"
            for contest, ratios in self.measured.items()
            for contestant in ratios
            if contestant not in {timing.name for timing in timings.get(contest, [])}
        ]
