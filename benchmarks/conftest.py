"""Runs the contests of benchmarks/ and hands their timings to pytest-benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.harness import Contest, Timing, WrongResult, compare


@dataclass
class Results:
    """The contests of this run by name: their timings, or why there are none."""

    timings: dict[str, list[Timing]] = field(default_factory=dict)
    refused: dict[str, WrongResult] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)  # by contest, who does not take part, and why


RESULTS = pytest.StashKey[Results]()


class Tape:
    """A clock that plays measured durations back.

    pytest-benchmark measures one function a test, one after the other. Here the contestants take turns, and
    pytest-benchmark is given the durations by way of this clock, so that its tables, files and comparisons work.
    """

    now = 0.0

    def play(self, seconds: Iterator[float]) -> None:
        """Let the next duration pass."""
        self.now += next(seconds, 0.0)


TAPE = Tape()


def tape_clock() -> float:
    """The time of TAPE, in seconds: the timer given to pytest-benchmark."""
    return TAPE.now


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("detr_fast benchmarks")
    group.addoption("--benchmark", action="store_true", help="Run the benchmarks, which are skipped otherwise.")
    group.addoption("--benchmark-results", metavar="FILE", help="Write machine, versions and all timings as JSON.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """``bench_*.py`` holds tests, beside the names pytest looks for by itself."""
    if file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.benchmark(timer=tape_clock))
        if not config.getoption("--benchmark"):
            item.add_marker(pytest.mark.skip(reason="a benchmark: runs with --benchmark"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not config.getoption("--benchmark"):
        return []
    return [f"{key}: {value}" for key, value in machine.describe().items()]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["detr_fast"] = machine.describe()


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[str, str, Callable[[], Contest]], None]:
    """Hold a contest, once for all its contestants, and record one contestant's timing in pytest-benchmark."""

    def run(name: str, contestant: str, build: Callable[[], Contest]) -> None:
        results = request.config.stash[RESULTS]
        if name not in results.timings and name not in results.refused:
            hold(name, build(), request.config, results)
        if name in results.refused:
            raise results.refused[name]
        if contestant in results.skipped[name]:
            pytest.skip(results.skipped[name][contestant])
        timing = next(t for t in results.timings[name] if t.name == contestant)
        benchmark.group = name
        benchmark.extra_info.update(ratio=timing.ratio, peak_bytes=timing.peak_bytes)
        seconds = iter(timing.seconds)
        benchmark.pedantic(TAPE.play, args=(seconds,), rounds=len(timing.seconds))

    return run


def hold(name: str, contest: Contest, config: pytest.Config, results: Results) -> None:
    """Run a contest for about ``--benchmark-max-time`` a contestant, at least ``--benchmark-min-rounds`` rounds."""
    seconds_each = float(config.getoption("--benchmark-max-time"))
    min_rounds = config.getoption("--benchmark-min-rounds")
    results.skipped[name] = contest.skipped
    try:
        results.timings[name] = compare(contest, seconds_each=seconds_each, min_rounds=min_rounds)
    except WrongResult as error:
        results.refused[name] = error


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    for name, timings in results.timings.items():
        terminalreporter.section(name, sep="-")
        for line in table(timings):
            terminalreporter.write_line(line)
    for name, error in results.refused.items():
        terminalreporter.section(f"{name}: refused", sep="-", red=True)
        terminalreporter.write_line(str(error))
    file = config.getoption("--benchmark-results")
    if file:
        write_results(Path(file), results)
        terminalreporter.write_line(f"written: {file}")


def table(timings: list[Timing]) -> list[str]:
    """One line a contestant: median, quartiles, ratio to the first with its quartiles, peak memory, share of floor."""
    header = (
        f"{'contestant':<24} {'median':>11} {'quartiles':>23} {'ratio':>8} {'quartiles':>17} "
        f"{'peak memory':>12} {'of floor':>8}"
    )
    return [header, *(row(timing) for timing in timings)]


def row(timing: Timing) -> str:
    """One contestant's line of the table."""
    low, high = (1e3 * value for value in timing.spread)
    ratio_low, ratio_high = timing.ratio_spread
    share = "" if timing.floor_share is None else f"{100 * timing.floor_share:.0f} %"
    return (
        f"{timing.name:<24} {1e3 * timing.median:>8.4g} ms {low:>9.4g} - {high:>8.4g} ms {timing.ratio:>7.2f}x "
        f"{ratio_low:>7.2f} - {ratio_high:>6.2f}x {timing.peak_bytes / 2**20:>8.1f} MiB {share:>8}"
    )


def write_results(file: Path, results: Results) -> None:
    """Machine, versions, commit, command and every timing of this run as JSON, a line a contestant."""
    contests = {name: [as_json(timing) for timing in timings] for name, timings in results.timings.items()}
    refused = {name: str(error) for name, error in results.refused.items()}
    head = {**machine.describe(), "refused": refused, "skipped": results.skipped}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    entries = [f'"{name}": [\n  ' + ",\n  ".join(map(json.dumps, contests[name])) + "\n ]" for name in contests]
    lines.append('"contests": {\n ' + ",\n ".join(entries) + "\n}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def as_json(timing: Timing) -> dict[str, Any]:
    """A contestant's timing; its durations to four digits."""
    return {
        "contestant": timing.name,
        "median_seconds": timing.median,
        "quartiles_seconds": timing.spread,
        "ratio_to_first": timing.ratio,
        "ratio_quartiles": timing.ratio_spread,
        "peak_bytes": timing.peak_bytes,
        "floor_share": timing.floor_share,
        "seconds": [float(f"{seconds:.4g}") for seconds in timing.seconds],
    }
