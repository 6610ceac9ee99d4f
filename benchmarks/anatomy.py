"""Where the time of a long call goes: a clock that a contestant carries and looks at between the parts of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.harness import Timing, summarise

ROUNDS = 3


@dataclass
class Clock:
    """Durations of the parts of every call that began while it was running.

    On a GPU looking at the clock waits for the device, so a call that is timed as a whole carries one that stands.
    """

    device: str = "cpu"
    running: bool = False
    calls: list[dict[str, float]] = field(default_factory=list)
    last: float = 0.0

    def start(self) -> None:
        """A call begins."""
        if self.running:
            self.calls.append({})
            self.last = self._now()

    def mark(self, part: str) -> None:
        """What happened since the last look was ``part``."""
        if self.running:
            now = self._now()
            self.calls[-1][part] = self.calls[-1].get(part, 0.0) + now - self.last
            self.last = now

    def _now(self) -> float:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def timings_of_parts(
    contestants: Mapping[str, tuple[Clock, Callable[[], object]]], rounds: int = ROUNDS
) -> dict[str, list[Timing]]:
    """Each part of a call as if it were a contest, of contestants that take turns; the first is the original way."""
    for _ in range(rounds):
        for clock, run in contestants.values():
            clock.running = True
            run()
            clock.running = False
    first, _ = next(iter(contestants.values()))
    return {part: _timings(part, {n: clock for n, (clock, _) in contestants.items()}) for part in first.calls[0]}


def _timings(part: str, clocks: Mapping[str, Clock]) -> list[Timing]:
    seconds = {name: [call[part] for call in clock.calls] for name, clock in clocks.items()}
    baseline = next(iter(seconds.values()))
    return [summarise(name, found, baseline, peak_bytes=None) for name, found in seconds.items()]
