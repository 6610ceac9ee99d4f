"""The plots of the report, as SVG that stands inside a page."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from detr_fast.bench.growth import Curve, fit
from detr_fast.bench.results import Contests, Row, format_seconds
from detr_fast.bench.tables import OURS, is_ours
from detr_fast.plots import BLUE, GREEN, ORANGE, PINK, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, LIGHT = "#6b7280", "#d1d5db"
# The same in every plot. Those that share a colour never meet.
OUR_COLORS = dict(zip(OURS, (BLUE, SKY, GREEN, "#84cc16", SKY, RED, BLUE, GREEN, SKY), strict=True))
OUR_OTHER_COLORS = ("#1e3a8a", "#6366f1", "#0e7490")
OTHER_COLORS = (GREY, ORANGE, PINK, "#a16207", "#7c3aed", "#0f766e", "#9f1239", "#475569")
PART_COLORS = (BLUE, SKY, GREEN, ORANGE, RED, PINK, "#a16207", "#7c3aed", GREY)
OTHER_MARKERS = "sD^vP*X<>ph"


def ratios(contests: Contests) -> str:
    """A line for each contest: how many times faster than the first everybody is, and where reruns have it."""
    names = list(contests)
    styles = _styles(contests.values())
    figure, axes = _figure(height=max(1.0 + 0.34 * len(names), 0.4 + 0.24 * len(styles)))
    for name, (color, marker) in styles.items():
        points = [(y, row) for y, contest in enumerate(names) for row in contests[contest][1:] if row.name == name]
        if not points:
            continue
        places, rows = zip(*points, strict=True)
        middle = [row.ratio for row in rows]
        lower = [max(0.0, row.ratio - row.ratio_spread[0]) for row in rows]
        upper = [max(0.0, row.ratio_spread[1] - row.ratio) for row in rows]
        size = 7 if is_ours(name) else 4.5
        axes.errorbar(middle, places, xerr=(lower, upper), fmt=marker, color=color, markersize=size, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    firsts = {rows[0].name for rows in contests.values()}
    labels = names if len(firsts) == 1 else [f"{name}, to {contests[name][0].name}" for name in names]
    axes.set(xscale="log", yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.4, -0.6))
    axes.set_xlim(*_wide_enough([row.ratio for rows in contests.values() for row in rows if not row.is_floor]))
    axes.set_xlabel(f"times as fast as {firsts.pop()}" if len(firsts) == 1 else "times as fast as the one behind “to”")
    _plain_ticks(axes)
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    figure.legend(loc="outside right upper", frameon=False)
    return _svg(figure)


def _wide_enough(ratios: Sequence[float]) -> tuple[float, float]:
    """Limits that all ratios are well within. What a disturbed contest's bars reach to would make the others small."""
    return min(ratios) / 1.5, max(ratios) * 1.5


def growth(curve: Curve) -> str:
    """Seconds over the size, both logarithmic, with the exponents in the legend."""
    figure, axes = _figure(width=6.4, height=4.4)
    styles = _styles([[Row(name, 0, (0, 0), 0, (0, 0), 0) for name in curve.lines]])
    dashes = itertools.cycle(("--", ":", "-."))
    for name, points in curve.lines.items():
        sizes, seconds = zip(*points, strict=True)
        if name.startswith("floor: "):
            axes.plot(sizes, seconds, next(dashes), color=GREY, linewidth=1, label=name)
            continue
        color, marker = styles[name]
        label = f"{name}: exponent {fit(points)}" if len(points) > 1 else name
        axes.plot(sizes, seconds, marker=marker, color=color, markersize=5, label=label)
    axes.set(xscale="log", yscale="log", xlabel=curve.axis, title=f"{curve.what} over {curve.axis}")
    values = sorted({size for points in curve.lines.values() for size, _ in points})
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(lambda seconds, _: re.sub(r"\.0+ ", " ", format_seconds(seconds)))
    axes.grid(color=LIGHT, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _svg(figure)


def anatomy(parts: Contests) -> str:
    """One bar for each contestant: the seconds of the parts of a call, but for those in brackets."""
    parts = shares(parts)
    names = [row.name for row in next(iter(parts.values()))]
    figure, axes = _figure(height=1.6 + 0.5 * len(names))
    for y, name in enumerate(names):
        left = 0.0
        for color, (part, rows) in zip(PART_COLORS * 3, parts.items(), strict=False):
            seconds = next((row.median for row in rows if row.name == name), 0.0)
            axes.barh(y, seconds, left=left, color=color, height=0.6, label=part if y == 0 else None)
            left += seconds
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6), xlabel="seconds of a call")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return _svg(figure)


def shares(parts: Contests) -> Contests:
    """The parts that make up the whole; those in brackets are in another part already, or happen beside the call."""
    return {name: rows for name, rows in parts.items() if not name.startswith("(")}


def _styles(contests: Iterable[Sequence[Row]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every contestant: ours as discs in strong colours."""
    names = list(dict.fromkeys(row.name for contest in contests for row in contest if not row.is_floor))
    ours, others = [n for n in names if is_ours(n)], [n for n in names if not is_ours(n)]
    settings = [n for n in ours if n not in OURS]
    return {
        **{name: (OTHER_COLORS[i % 8], OTHER_MARKERS[i % 11]) for i, name in enumerate(others)},
        **{name: (OUR_COLORS[name], "o") for name in ours if name in OURS},
        **{name: (OUR_OTHER_COLORS[i % 3], "o") for i, name in enumerate(settings)},
    }


def _figure(width: float = 10.0, height: float = 4.0) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain_ticks(axes: Axes) -> None:
    """Decades; parts of each where there are few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_xlim()
    few, more = (1.0, 2.0, 5.0), (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.xaxis.set_major_locator(LogLocator(subs=more if high / low < 6 else few if high / low < 200 else (1.0,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure) -> str:
    """The drawing alone, with the reader's own fonts, so that a page of them stays small."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "detr_fast"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg[svg.index("<svg") :]
