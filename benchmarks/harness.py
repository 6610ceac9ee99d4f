"""Compare contestants that compute the same thing: first whether they are right, then how long each takes.

``compare`` refuses to time anything when one contestant is wrong. The contestants then take turns in one process, so
that a machine that slows down or speeds up does so for all of them, and the ratio to the first contestant is formed
turn by turn before its median is taken.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from detr_fast.bench.spread import ratio_to
from detr_fast.ops import _native

Check = Callable[[Any], None]

# The first rounds fill caches and choose algorithms; they are measured only to choose the number of rounds. One is
# enough where a call takes so many seconds that nothing is cold in the rest of it.
WARMUP_ROUNDS = 3
LONG_ROUND = 1.0
# Of contests with a turn as long as that: what varies from turn to turn is little beside it.
LONG_ROUNDS = 3
MOST_ROUNDS = 200
# Seconds. Calls shorter than this are repeated within a turn: one alone measures how fast a processor at rest wakes up.
SHORTEST_TURN = 1e-3
# Seconds. A turn begins with a call that is not timed and brings code and data back into the caches, which a call
# longer than this does for itself.
LONG_CALL = 0.1
# Seconds before each turn. The threads of OpenMP (torch's, and some packages' own) wait for work at full speed for 16
# milliseconds after a call, on the cores that the next contestant's threads need.
REST = 0.02


class WrongResult(AssertionError):
    """A contestant computed something else than it should, so no speed is given."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute the result: a name and a call without arguments.

    Attributes:
        fresh: makes a call that shares no working memory with calls before, where those keep tensors to work in for the
            next; peak memory is that of its first use.
        counts_memory: whether ``peak_memory`` sees it; not that of a program that asks the system itself.
    """

    name: str
    run: Callable[[], Any]
    fresh: Callable[[], Callable[[], Any]] | None = None
    counts_memory: bool = True

    def peak_memory(self, device: str) -> int | None:
        """Most bytes held at once during a call; None where they cannot be counted."""
        if not self.counts_memory:
            return None
        return peak_memory(self.run if self.fresh is None else self.fresh(), device)


@dataclass(frozen=True)
class Timing:
    """What one contestant needed.

    Attributes:
        name: the contestant's.
        seconds: the duration of each round, in the order of the rounds.
        ratio: how many times faster than the first contestant, the median over rounds.
        ratio_spread: between which values that ratio lies in 95 % of runs like this one (detr_fast.bench.spread).
        peak_bytes: most memory held at once during one call, as ``peak_memory`` counts it; None where it cannot.
        floor_share: what the machine needs at least (the longest floor of the contest), as a share of the median; None
            without a floor, and of a floor.
        kernels: how many kernels a call launches; None on the CPU.
        host_waits: how often the host waits for the device in a call; None on the CPU.
    """

    name: str
    seconds: tuple[float, ...]
    ratio: float
    ratio_spread: tuple[float, float]
    peak_bytes: int | None
    floor_share: float | None = None
    kernels: int | None = None
    host_waits: int | None = None

    @property
    def median(self) -> float:
        """Median duration in seconds."""
        return median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the duration in seconds."""
        return quartiles(self.seconds)


@dataclass(frozen=True)
class Contest:
    """Contestants for one size, the first of them the original way.

    Attributes:
        contestants: ratios refer to the first.
        check: takes a contestant's result and raises where it is wrong.
        device: where the work happens; on CUDA every call is timed until the device has finished.
        floors: what every contestant does at least, such as reading the inputs once; timed in the same turns.
        skipped: contestants that do not take part, by name, and why.
        parts: times the parts of a call, by name, each as if it were a contest of its own.
    """

    contestants: Sequence[Contestant]
    check: Check
    device: str = "cpu"
    floors: Sequence[Contestant] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    parts: Callable[[], dict[str, list[Timing]]] | None = None

    @property
    def timed(self) -> list[Contestant]:
        """Contestants and floors."""
        return [*self.contestants, *self.floors]


def compare(contest: Contest, *, seconds_each: float = 1.0, min_rounds: int = 5) -> list[Timing]:
    """Check every contestant, then time them in turns.

    Args:
        contest: who takes part.
        seconds_each: about how long the turns of each contestant take altogether, which are MOST_ROUNDS at most.
        min_rounds: how often each runs at least, LONG_ROUNDS where that takes long, and never only once; the order
            is drawn anew each round.

    Raises:
        WrongResult: a contestant's result did not pass the check; nothing was timed.
    """
    for contestant in contest.contestants:
        refuse_unless_right(contestant, contest.check)
    warmup = warm_up(contest)
    turns = {name: Turn.of(median(seconds)) for name, seconds in warmup.items()}
    longest = REST + max(turns[name].calls * median(seconds) for name, seconds in warmup.items())
    least = min(min_rounds, LONG_ROUNDS) if longest > LONG_ROUND else min_rounds
    rounds = max(2, least, min(MOST_ROUNDS, math.ceil(seconds_each / longest)))
    seconds = take_turns(contest, rounds, turns)
    baseline = seconds[contest.contestants[0].name]
    timings = [summarise(c.name, seconds[c.name], baseline, c.peak_memory(contest.device)) for c in contest.timed]
    if torch.device(contest.device).type == "cuda":
        counts = [device_calls(c.run) for c in contest.timed]
        timings = [replace(t, kernels=k, host_waits=w) for t, (k, w) in zip(timings, counts, strict=True)]
    floor = max((median(seconds[c.name]) for c in contest.floors), default=None)
    runners = len(contest.contestants)
    return [
        replace(timing, floor_share=floor / timing.median) if floor is not None and place < runners else timing
        for place, timing in enumerate(timings)
    ]


def warm_up(contest: Contest) -> dict[str, list[float]]:
    """The durations of the first rounds."""
    first = take_turns(contest, 1, {c.name: Turn(untimed=0) for c in contest.timed})
    if sum(sum(seconds) for seconds in first.values()) > LONG_ROUND:
        return first
    return take_turns(contest, WARMUP_ROUNDS - 1)


def refuse_unless_right(contestant: Contestant, check: Check) -> None:
    """Raise WrongResult, with the contestant's name, unless its result passes ``check``."""
    try:
        check(contestant.run())
    except Exception as error:
        raise WrongResult(f"{contestant.name} is wrong, so no speed is given: {error}") from error


@dataclass(frozen=True)
class Turn:
    """How often a contestant is called in a turn: first ``untimed`` times, then ``timed`` times on the clock."""

    untimed: int = 1
    timed: int = 1

    @staticmethod
    def of(seconds: float) -> Turn:
        """For calls of this duration."""
        return Turn(int(seconds < LONG_CALL), max(1, math.ceil(SHORTEST_TURN / seconds)))

    @property
    def calls(self) -> int:
        """Altogether."""
        return self.untimed + self.timed


def take_turns(contest: Contest, rounds: int, turns: dict[str, Turn] | None = None) -> dict[str, list[float]]:
    """Time every contestant once a round, in an order drawn anew each round, without the garbage collector.

    A turn is a call after another, or what ``turns`` says for the contestant; its duration is that of one call.
    """
    wait = torch.cuda.synchronize if torch.device(contest.device).type == "cuda" else nothing
    contestants = contest.timed
    order = random.Random(0)
    seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
    gc_was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for contestant in order.sample(contestants, len(contestants)):
                turn = Turn() if turns is None else turns[contestant.name]
                seconds[contestant.name].append(time_turn(contestant.run, turn, wait))
    finally:
        if gc_was_enabled:
            gc.enable()
    return seconds


def time_turn(run: Callable[[], Any], turn: Turn, wait: Callable[[], None]) -> float:
    """Seconds of a call."""
    time.sleep(REST)
    for _ in range(turn.untimed):
        run()
    wait()
    start = time.perf_counter()
    for _ in range(turn.timed):
        run()
    wait()
    return (time.perf_counter() - start) / turn.timed


def nothing() -> None:
    """The CPU has finished when the call returns."""


def summarise(name: str, seconds: Sequence[float], baseline: Sequence[float], peak_bytes: int | None) -> Timing:
    """Timing of one contestant, with its ratio to ``baseline`` formed round by round."""
    ratio, ratio_spread = ratio_to(baseline, seconds)
    return Timing(name, tuple(seconds), ratio, ratio_spread, peak_bytes)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile of two values or more."""
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def peak_memory(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes held at once during ``run()``, over what was held before.

    Those of torch's allocator, and on the CPU those that the native module takes for itself, in which what its threads
    keep for the next call counts as taken by every call; the two peaks are added, though the one may come after the
    other. Memory that NumPy, SciPy and other packages take is not in it.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    native = _native.load().module
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        if native is not None:
            native.start_counting_memory()
        run()
        peak = 0 if native is None else native.stop_counting_memory()
    return peak + max(itertools.accumulate(allocations(trace_events(profile)), initial=0))


def allocations(events: Sequence[dict[str, Any]]) -> list[int]:
    """Bytes taken (positive) and given back (negative) on the CPU, in the order of time."""
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type") == 0]
    return [e["args"]["Bytes"] for e in sorted(memory, key=lambda e: e["ts"])]


def device_calls(run: Callable[[], Any]) -> tuple[int, int]:
    """Kernels that ``run()`` launches on CUDA, and calls in it that make the host wait for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(COUNTED):
            run()
        torch.cuda.synchronize()
    events = trace_events(profile)
    return kernels_of(events), waits_of(events)


COUNTED = "counted by the harness"
# Of CUDA's runtime and driver. A copy from the device to pageable memory is followed by one of them in PyTorch.
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "CtxSynchronize", "cudaMemcpy", "cudaFree")


def kernels_of(events: Sequence[dict[str, Any]]) -> int:
    """Kernels that ran on the device, those of a CUDA graph one by one."""
    return sum(event.get("cat") == "kernel" for event in events)


def waits_of(events: Sequence[dict[str, Any]]) -> int:
    """Calls that wait, while the part named COUNTED ran: the profiler waits too, before and after."""
    (counted,) = (e for e in events if e.get("name") == COUNTED and e.get("cat") == "user_annotation")
    start, end = counted["ts"], counted["ts"] + counted["dur"]
    return sum(
        event.get("cat") in ("cuda_runtime", "cuda_driver")
        and start <= event["ts"] <= end
        and (event["name"] in WAITS or event["name"].removeprefix("cuda").removeprefix("cu") in WAITS)
        for event in events
    )


def trace_events(profile: torch.profiler.profile) -> list[dict[str, Any]]:
    """Of the exported trace, which is the only public place where single allocations and calls of the driver stand."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    return events
