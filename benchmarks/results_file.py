"""A run's timings as text: the table that is printed, and the JSON file that is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.harness import Timing

Contests = Mapping[str, Sequence[Timing]]


def table(timings: Sequence[Timing]) -> list[str]:
    """A line each: median, quartiles, ratio to the first, where a rerun has it, peak memory, share of floor."""
    header = (
        f"{'contestant':<24} {'median':>11} {'quartiles':>23} {'ratio':>8} {'in a rerun':>17} "
        f"{'peak memory':>12} {'of floor':>8}"
    )
    if timings[0].kernels is not None:
        header += f" {'kernels':>8} {'waits':>6}"
    return [header, *(row(timing) for timing in timings)]


def row(timing: Timing) -> str:
    """One contestant's line of the table."""
    low, high = (1e3 * value for value in timing.spread)
    ratio_low, ratio_high = timing.ratio_spread
    share = "" if timing.floor_share is None else f"{100 * timing.floor_share:.0f} %"
    memory = "not counted" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.1f} MiB"
    counts = "" if timing.kernels is None else f" {timing.kernels:>8} {timing.host_waits:>6}"
    return (
        f"{timing.name:<24} {1e3 * timing.median:>8.4g} ms {low:>9.4g} - {high:>8.4g} ms {timing.ratio:>7.2f}x "
        f"{ratio_low:>7.2f} - {ratio_high:>6.2f}x {memory:>12} {share:>8}{counts}"
    )


def write_results(
    file: Path,
    timings: Contests,
    parts: Mapping[str, Contests],
    refused: Mapping[str, Exception],
    skipped: Mapping[str, Mapping[str, str]],
    finished: bool,
) -> None:
    """Machine, versions, commit, command, how long the run took, and every timing as JSON, a line a contestant.

    A file that is not ``finished`` is that of a run which still goes on, or was cut short.
    """
    reasons = {name: str(error) for name, error in refused.items()}
    head = {**machine.describe(), "elapsed_seconds": machine.elapsed_seconds(), "finished": finished}
    head["cores_of_others"] = machine.cores_of_others()
    head["refused"] = reasons
    head["skipped"] = {name: why for name, why in skipped.items() if why}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    if parts:
        lines.append('"parts": {\n' + ",\n".join(f'"{name}": {listed(of)}' for name, of in parts.items()) + "\n}")
    lines.append(f'"contests": {listed(timings)}')
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def listed(contests: Contests) -> str:
    """JSON, a line a contestant."""
    entries = [
        f'"{name}": [\n  ' + ",\n  ".join(json.dumps(as_json(timing)) for timing in timings) + "\n ]"
        for name, timings in contests.items()
    ]
    return "{\n " + ",\n ".join(entries) + "\n}"


def as_json(timing: Timing) -> dict[str, Any]:
    """A contestant's timing; its durations to four digits."""
    return {
        "contestant": timing.name,
        "median_seconds": timing.median,
        "quartiles_seconds": timing.spread,
        "ratio_to_first": timing.ratio,
        "ratio_spread": timing.ratio_spread,
        "peak_bytes": timing.peak_bytes,
        "floor_share": timing.floor_share,
        "kernels": timing.kernels,
        "host_waits": timing.host_waits,
        "seconds": [float(f"{seconds:.4g}") for seconds in timing.seconds],
    }
