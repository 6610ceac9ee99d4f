"""The results files that ``pytest benchmarks/ --benchmark --benchmark-results FILE`` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_fast.bench.spread import ratio_to

# Cores that others keep busy: beyond it durations are those of a busy machine.
BUSY = 0.1
HEAD = ("cpu", "memory", "gpu", "system", "versions", "commit", "command")


@dataclass(frozen=True)
class Row:
    """One contestant of a contest; durations in seconds, ratios to the first contestant.

    Attributes:
        median, quartiles: duration of a call.
        ratio, ratio_spread: how many times faster than the first contestant, and where ``bench.spread`` has a rerun's.
        peak_bytes: most memory held at once in a call, of torch's allocator and the native module; None where it could
            not be counted.
        floor_share: what the machine needs at least, as a share of the median, where it was measured.
        kernels, host_waits: of a call on a GPU, where they were counted.
    """

    name: str
    median: float
    quartiles: tuple[float, float]
    ratio: float
    ratio_spread: tuple[float, float]
    peak_bytes: int | None
    floor_share: float | None = None
    kernels: int | None = None
    host_waits: int | None = None

    @property
    def is_floor(self) -> bool:
        """Whether it is no contestant but a part of what all of them do."""
        return self.name.startswith("floor: ")


Contests = dict[str, list[Row]]


@dataclass(frozen=True)
class Results:
    """One file.

    Attributes:
        name: the file's, without its ending.
        head: machine, versions, commit and command.
        contests: rows by contest; the first of each is what ratios refer to.
        parts: of some contests, rows by part of a call.
        refused: contests without a speed, because a contestant was wrong, and what was wrong.
        skipped: by contest, who did not take part, and why.
        elapsed_seconds: how long the whole run took, where it was recorded.
        cores_of_others: how many cores other processes kept busy meanwhile, on average, where it was recorded.
        finished: whether the run went to its end; one that was cut short has fewer contests.
    """

    name: str
    head: dict[str, str]
    contests: Contests
    parts: dict[str, Contests]
    refused: dict[str, str]
    skipped: dict[str, dict[str, str]]
    elapsed_seconds: int | None = None
    finished: bool = True
    cores_of_others: float | None = None

    @property
    def disturbance(self) -> str:
        """In words, how busy others kept the machine; empty where they did not, or where it was not recorded."""
        if self.cores_of_others is None or self.cores_of_others <= BUSY:
            return ""
        return f"other processes kept {self.cores_of_others:.1f} cores busy meanwhile"

    @property
    def is_quick(self) -> bool:
        """Whether it is of a few rounds of the small sizes, which other files have measured better."""
        return "--benchmark-quick" in self.head["command"].split()

    @property
    def has_gpu(self) -> bool:
        """Whether it was written on a machine with a GPU."""
        return self.head["gpu"] != "none"


def read_results(file: Path) -> Results | None:
    """One results file; None where the file is of another kind, such as ``exactness.json``.

    Raises:
        ValueError: it is no JSON, or lacks something.
    """
    try:
        content = json.loads(file.read_text())
        if not (isinstance(content, dict) and "contests" in content):
            return None
        return Results(
            name=file.stem,
            head={key: content.get(key, "not recorded") for key in HEAD},
            contests=_contests(content["contests"]),
            parts={name: _contests(parts) for name, parts in content.get("parts", {}).items()},
            refused=content.get("refused", {}),
            skipped=content.get("skipped", {}),
            elapsed_seconds=content.get("elapsed_seconds"),
            finished=content.get("finished", True),
            cores_of_others=content.get("cores_of_others"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} must be a results file of the benchmarks: {error!r}") from error


def read_all(files: Iterable[Path]) -> list[Results]:
    """The results files among ``files``, by name.

    Raises:
        ValueError: there is none, or two have the same name.
    """
    files = list(files)
    found = [results for file in sorted(files) if (results := read_results(file)) is not None]
    if not found:
        raise ValueError(f"results must name files written by --benchmark-results, got {[str(f) for f in files]}")
    names = [results.name for results in found]
    if len(set(names)) < len(names):
        raise ValueError(f"results must have different names, got {names}")
    return found


def _contests(content: dict[str, list[dict[str, Any]]]) -> Contests:
    return {name: [_row(entry, entries[0]["seconds"]) for entry in entries] for name, entries in content.items()}


def _row(entry: dict[str, Any], baseline: list[float]) -> Row:
    low, high = entry["quartiles_seconds"]
    _, ratio_spread = ratio_to(baseline, entry["seconds"])  # files of older releases have another spread
    return Row(
        entry["contestant"],
        entry["median_seconds"],
        (low, high),
        entry["ratio_to_first"],
        ratio_spread,
        entry["peak_bytes"],
        entry.get("floor_share"),
        entry.get("kernels"),
        entry.get("host_waits"),
    )


def format_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns"


def format_ratio(ratio: float) -> str:
    """Two digits, more where the number is larger than 100 or close to 1."""
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.95 else f"{ratio:.2f}"


def format_bytes(count: float | None) -> str:
    """In MiB; of what could not be counted, that."""
    return "not counted" if count is None else f"{_three_digits(count / 2**20)} MiB"


def _three_digits(number: float) -> str:
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}"
