"""JSON files beside the results files that hold no contests, such as ``exactness.json``: what a check found."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Facts = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What one command found.

    Attributes:
        command: as the file has it.
        facts: single values by name: the machine, sizes, counts.
        rows: values by name, of everything that stands deeper, by its path ("trained: plain").
    """

    command: str
    facts: Facts
    rows: dict[str, Facts]

    def tables(self) -> list[dict[str, Facts]]:
        """The rows; those that follow each other with the same columns are one table."""
        groups = itertools.groupby(self.rows.items(), key=lambda row: list(row[1]))
        return [dict(group) for _, group in groups]


@dataclass(frozen=True)
class Findings:
    """One file: its name without its ending, and its runs."""

    name: str
    runs: list[Run]


def read_findings(files: Iterable[Path]) -> list[Findings]:
    """Of the files that hold an object, or a list of them, and no contests; by name.

    Raises:
        ValueError: a file is no JSON.
    """
    found = []
    for file in sorted(files):
        try:
            content = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} must be JSON: {error}") from error
        runs = content if isinstance(content, list) else [content]
        if runs and all(isinstance(run, dict) and "contests" not in run for run in runs):
            found.append(Findings(file.stem, [_run(run) for run in runs]))
    return found


def _run(content: Mapping[str, Any]) -> Run:
    rows = dict(_rows("", content))
    facts = rows.pop("", {})
    return Run(str(facts.pop("command", "not recorded")), facts, rows)


def _rows(path: str, content: Mapping[str, Any]) -> Iterator[tuple[str, Facts]]:
    """(path, single values) of an object and of all that are in it."""
    values = {key: value for key, value in content.items() if not isinstance(value, dict)}
    if values:
        yield path, values
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _rows(f"{path}: {key}" if path else key, value)
