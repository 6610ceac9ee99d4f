"""Runs the contests of benchmarks/ and hands their timings to pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, where
from benchmarks.guard import ROUNDS, TRIES, Floors
from benchmarks.harness import Contest, Timing, WrongResult, compare
from benchmarks.results_file import table, write_results
from detr_fast.bench.results import BUSY

# --benchmark-quick: about as long each contestant is timed, and in how many rounds at least.
QUICK_SECONDS, QUICK_ROUNDS = 0.05, 3
# Where --benchmark-max-time is not given: pytest-benchmark's second would make the suite take longer than half an hour.
SECONDS = 0.3


@dataclass
class Results:
    """The contests of this run by name: their timings, or why there are none."""

    timings: dict[str, list[Timing]] = field(default_factory=dict)
    parts: dict[str, dict[str, list[Timing]]] = field(default_factory=dict)  # by contest and part of a call
    refused: dict[str, WrongResult] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)  # by contest, who does not take part, and why
    too_slow: dict[str, dict[str, str]] = field(default_factory=dict)  # by contest, who is below a floor


RESULTS = pytest.StashKey[Results]()
FLOORS = pytest.StashKey[Floors]()


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
    group.addoption("--benchmark-quick", action="store_true", help="Few rounds, and none of the large sizes.")
    group.addoption("--benchmark-device", metavar="DEVICE", help="cpu or cuda; the GPU where there is one.")
    group.addoption("--benchmark-results", metavar="FILE", help="Write machine, versions and all timings as JSON.")
    group.addoption(
        "--benchmark-floors",
        metavar="FILE",
        help=f"Run only contests with a floor in this file, and fail where a ratio is below its floor {TRIES} times.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: a benchmark that --benchmark-quick leaves out")
    config.stash[RESULTS] = Results()
    floors, device = config.getoption("--benchmark-floors"), config.getoption("--benchmark-device")
    try:
        config.stash[FLOORS] = Floors.read(Path(floors)) if floors else Floors(1.0, {})
        if device:
            where.choose(device)
    except (OSError, KeyError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """``bench_*.py`` holds tests, beside the names pytest looks for by itself, and the files that it is given."""
    named = parent.session.isinitpath(file_path)
    if file_path.suffix == ".py" and file_path.name.startswith("bench_") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    benchmarks = [item for item in items if here in item.path.parents]
    for item in benchmarks:
        item.add_marker(pytest.mark.benchmark(timer=tape_clock))
        if not config.getoption("--benchmark"):
            item.add_marker(pytest.mark.skip(reason="a benchmark: runs with --benchmark"))
        elif config.getoption("--benchmark-quick") and item.get_closest_marker("large"):
            item.add_marker(pytest.mark.skip(reason="large: left out by --benchmark-quick"))


PLACE = pytest.StashKey[str]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Number what is left after ``-k``, for the progress line."""
    for number, item in enumerate(session.items, start=1):
        item.stash[PLACE] = f"{number} of {len(session.items)}"


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not config.getoption("--benchmark"):
        return []
    return [f"{key}: {value}" for key, value in machine.describe().items()]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Only what two runs on one machine have in common: pytest-benchmark warns where it differs."""
    described = machine.describe()
    machine_info["detr_fast"] = {key: described[key] for key in ("cpu", "memory", "gpu", "system", "versions")}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json["detr_fast"] = machine.describe()


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[str, str, Callable[[], Contest]], None]:
    """Hold a contest, once for all its contestants, and record one contestant's timing in pytest-benchmark."""

    def run(name: str, contestant: str, build: Callable[[], Contest]) -> None:
        config = request.config
        results, floors = config.stash[RESULTS], config.stash[FLOORS]
        if config.getoption("--benchmark-floors") and name not in floors.measured:
            pytest.skip("no floor is kept for this contest")
        if name not in results.timings and name not in results.refused:
            show_progress(config, f"[{request.node.stash[PLACE]}] {name}")
            hold(name, build(), config)
            write(config)
        if name in results.refused:
            raise results.refused[name]
        if contestant in results.skipped[name]:
            pytest.skip(results.skipped[name][contestant])
        timing = next((t for t in results.timings[name] if t.name == contestant), None)
        if timing is None:
            pytest.skip("no floor is kept for this contestant")
        record(benchmark, name, timing)
        if contestant in results.too_slow[name]:
            pytest.fail(results.too_slow[name][contestant], pytrace=False)

    return run


def hold(name: str, contest: Contest, config: pytest.Config) -> None:
    """Run a contest, ``--benchmark-max-time`` (or SECONDS) and ``--benchmark-min-rounds`` rounds a contestant.

    It is held again where a contestant is below its floor: a machine may be busy for a moment.
    """
    given = any(str(a).startswith("--benchmark-max-time") for a in config.invocation_params.args)
    seconds_each = float(config.getoption("--benchmark-max-time")) if given else SECONDS
    min_rounds = config.getoption("--benchmark-min-rounds")
    if config.getoption("--benchmark-quick"):
        seconds_each, min_rounds = min(seconds_each, QUICK_SECONDS), min(min_rounds, QUICK_ROUNDS)
    results, floors = config.stash[RESULTS], config.stash[FLOORS]
    if config.getoption("--benchmark-floors"):
        contest, min_rounds = floors.needed(name, contest), max(min_rounds, ROUNDS)
    results.skipped[name] = contest.skipped
    try:
        for _ in range(TRIES):
            results.timings[name] = compare(contest, seconds_each=seconds_each, min_rounds=min_rounds)
            results.too_slow[name] = floors.too_slow(name, results.timings[name])
            if not results.too_slow[name]:
                break
        if contest.parts is not None:
            results.parts[name] = contest.parts()
    except WrongResult as error:
        results.timings.pop(name, None)
        results.refused[name] = error


def write(config: pytest.Config, *, finished: bool = False) -> bool:
    """Write the results so far, if a file was asked for: a run that is cut short leaves those."""
    file, results = config.getoption("--benchmark-results"), config.stash[RESULTS]
    if file:
        write_results(Path(file), results.timings, results.parts, results.refused, results.skipped, finished)
    return bool(file)


def record(benchmark: Any, name: str, timing: Timing) -> None:
    """Play a contestant's durations to pytest-benchmark."""
    benchmark.group = name
    benchmark.extra_info.update(ratio=timing.ratio, peak_bytes=timing.peak_bytes)
    if timing.kernels is not None:
        benchmark.extra_info.update(kernels=timing.kernels, host_waits=timing.host_waits)
    seconds = iter(timing.seconds)
    benchmark.pedantic(TAPE.play, args=(seconds,), rounds=len(timing.seconds))


def show_progress(config: pytest.Config, text: str) -> None:
    """Begin a line on the terminal, past pytest's capturing of output; pytest goes on in it."""
    capture = config.pluginmanager.getplugin("capturemanager")
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or config.get_verbosity() < -1:
        return
    with capture.global_and_fixture_disabled():
        reporter.write(f"\n{machine.elapsed_seconds():5} s {text} ", flush=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    for name, timings in results.timings.items():
        terminalreporter.section(name, sep="-")
        for line in table(timings):
            terminalreporter.write_line(line)
    for name, parts in results.parts.items():
        for part, timings in parts.items():
            terminalreporter.section(f"{name}, {part}", sep="-")
            for line in table(timings):
                terminalreporter.write_line(line)
    for name, error in results.refused.items():
        terminalreporter.section(f"{name}: refused", sep="-", red=True)
        terminalreporter.write_line(str(error))
    for floor in unheld_floors(config):
        terminalreporter.write_line(f"a floor was not held, its contestant did not run: {floor}", red=True)
    if results.timings:
        minutes, seconds = divmod(machine.elapsed_seconds(), 60)
        terminalreporter.write_line(f"{len(results.timings)} contests took {minutes} minutes and {seconds} seconds")
        others = machine.cores_of_others()
        if others is not None and others > BUSY:
            terminalreporter.write_line(f"other processes kept {others:.1f} cores busy meanwhile", yellow=True)
    if write(config, finished=exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)):
        terminalreporter.write_line(f"written: {config.getoption('--benchmark-results')}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A floor that nothing was held to is a failure too."""
    if session.exitstatus == pytest.ExitCode.OK and unheld_floors(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def unheld_floors(config: pytest.Config) -> list[str]:
    """Floors without a timing; none where ``-k`` picks a part."""
    results = config.stash[RESULTS]
    if config.getoption("--collect-only") or config.getoption("-k") or results.refused:
        return []
    return config.stash[FLOORS].unheld(results.timings)
