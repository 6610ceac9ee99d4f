"""How a time grows with a size: the exponent, fitted to the points of a curve."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detr_fast.bench.results import Row

POINT = re.compile(r"(?P<what>.+) over (?P<axis>[a-z ]+): (?P<value>\d+)")
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Growth:
    """Seconds proportional to size ** exponent, between the smallest and the largest size.

    Attributes:
        exponent: the slope of the least squares line through the logarithms.
        error: half the width of its 95 % range, from the points' distances to the line; None with two points, through
            which there is always a line.
    """

    exponent: float
    error: float | None
    smallest: int
    largest: int

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" if self.error is None else f"{self.exponent:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Curve:
    """The points of every contestant and floor."""

    what: str
    axis: str
    lines: dict[str, Points]


def fit(points: Sequence[tuple[int, float]]) -> Growth:
    """The exponent of growth through (size, seconds).

    Raises:
        ValueError: fewer than two sizes.
    """
    from scipy.stats import t  # not at import: it takes a second

    sizes = [size for size, _ in points]
    if len(set(sizes)) < 2:
        raise ValueError(f"points must have two sizes at least, got {sizes}")
    x, y = [math.log(size) for size in sizes], [math.log(seconds) for _, seconds in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    if len(x) == 2:
        return Growth(slope, None, min(sizes), max(sizes))
    residual = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(residual / (len(x) - 2) / spread) * float(t.ppf(0.975, len(x) - 2))
    return Growth(slope, error, min(sizes), max(sizes))


def curves(contests: Mapping[str, Sequence[Row]]) -> list[Curve]:
    """Those whose points are among the contests, which are called "<what> over <axis>: <value>"."""
    found: dict[tuple[str, str], dict[str, Points]] = {}
    for name, rows in contests.items():
        point = POINT.fullmatch(name)
        if point is None:
            continue
        lines = found.setdefault((point["what"], point["axis"]), {})
        for row in rows:
            lines.setdefault(row.name, []).append((int(point["value"]), row.median))
    return [
        Curve(what, axis, {name: sorted(points) for name, points in lines.items()})
        for (what, axis), lines in found.items()
        if any(len(points) > 1 for points in lines.values())
    ]
