"""Two results files of one machine side by side: whether a ratio moved further than runs of the same code do."""

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
        """Whether each run's ratio lies where the other run does not expect a rerun's.

        One alone may have seen too little of what disturbs the machine. Of runs of the same code one in twenty differs
        where a disturbance lasts for half of a run, and far fewer on a steady machine.
        """
        return not (_holds(self.before, self.after.ratio) or _holds(self.after, self.before.ratio))


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
    lines = [f"{'':<{width}}  {'ratio':>7} {'in a rerun':>17}  {'ratio':>7} {'in a rerun':>17}"]
    for change in found:
        name = f"{change.contest}: {change.before.name}"
        note = "differs" if change.beyond_spread else "same within the spread"
        lines.append(f"{name:<{width}}  {_ratio(change.before)}  {_ratio(change.after)}  {note}")
    moved = sum(change.beyond_spread for change in found)
    return "\n".join([*lines, f"{moved} of {len(found)} ratios differ by more than a rerun's would."])


def _holds(row: Row, ratio: float) -> bool:
    low, high = row.ratio_spread
    return low <= ratio <= high


def _ratio(row: Row) -> str:
    low, high = map(format_ratio, row.ratio_spread)
    return f"{format_ratio(row.ratio):>7} {low:>7} - {high:>7}"
