"""Two results files of one machine side by side: whether a ratio moved by more than its spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detr_fast.bench.results import Results, Row, format_ratio, read_results


@dataclass(frozen=True)
class Change:
    """One contestant in both files."""

    contest: str
    before: Row
    after: Row

    @property
    def beyond_spread(self) -> bool:
        """Whether the two runs' quartiles of the ratio do not overlap."""
        (low, high), (other_low, other_high) = self.before.ratio_quartiles, self.after.ratio_quartiles
        return high < other_low or other_high < low


def read_two(files: Sequence[Path]) -> tuple[Results, Results]:
    """Before and after, in this order.

    Raises:
        ValueError: there are not two files, or one holds no contests.
    """
    found = [results for file in files if (results := read_results(file)) is not None]
    if len(files) != 2 or len(found) != 2:
        raise ValueError(f"compare must be given two results files, got {[str(file) for file in files]}")
    return found[0], found[1]


def changes(before: Results, after: Results) -> list[Change]:
    """Contestants that are in both files, but for those that ratios refer to and the floors.

    Raises:
        ValueError: the files are of different machines.
    """
    for key in ("cpu", "gpu"):
        if before.head[key] != after.head[key]:
            raise ValueError(
                f"compare must be given two files of one machine, got {before.head[key]!r} and {after.head[key]!r}"
            )
    return [
        Change(contest, old, new)
        for contest, rows in before.contests.items()
        for old in rows[1:]
        for new in after.contests.get(contest, [])
        if old.name == new.name and not old.is_floor
    ]


def render(found: list[Change]) -> str:
    """A line each, and how many moved."""
    width = max((len(f"{c.contest}: {c.before.name}") for c in found), default=0)
    lines = [f"{'':<{width}}  {'ratio':>7} {'quartiles':>17}  {'ratio':>7} {'quartiles':>17}"]
    for change in found:
        name = f"{change.contest}: {change.before.name}"
        note = "  moved" if change.beyond_spread else ""
        lines.append(f"{name:<{width}}  {_ratio(change.before)}  {_ratio(change.after)}{note}")
    moved = sum(change.beyond_spread for change in found)
    return "\n".join([*lines, f"{moved} of {len(found)} ratios moved by more than the quartiles of both runs."])


def _ratio(row: Row) -> str:
    low, high = map(format_ratio, row.ratio_quartiles)
    return f"{format_ratio(row.ratio):>7} {low:>7} - {high:>7}"
