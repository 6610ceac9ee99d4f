"""Curves of a training run, drawn from its ``log.jsonl``."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_NAME = "log.jsonl"
PLOT_NAME = "curves.png"

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
TERM_COLORS = {"ce": BLUE, "bbox": ORANGE, "giou": GREEN, "mask": PINK, "dice": SKY}
AP_COLORS = {"AP": BLUE, "AP50": ORANGE, "AP75": GREEN}
# What an evaluation measures, by its name in the log: a title, and the curves.
SCORES = {
    "coco_bbox": ("box AP", AP_COLORS),
    "coco_segm": ("mask AP", AP_COLORS),
    "coco_panoptic": ("panoptic quality", {"PQ": BLUE, "PQ_things": ORANGE, "PQ_stuff": GREEN}),
}
# Auxiliary layers ("loss_ce_3") and unweighted copies ("loss_ce_unscaled") would hide the terms themselves.
TERM = re.compile(r"train_loss_([a-z]+)")

Epoch = dict[str, Any]


def plot_log(output_dir: str | Path, path: str | Path | None = None) -> Path:
    """Draw the losses, AP and learning rates of a run over its epochs.

    A line of the log that cannot be read (a killed run leaves half a line) is skipped, a value that is missing or no
    number is left out of its curve, and of an epoch that was run again after a resume the last line counts.

    Args:
        output_dir: the folder of the run; its ``log.jsonl`` is read.
        path: the PNG to write; None takes ``curves.png`` in ``output_dir``.

    Returns:
        The path of the PNG.

    Raises:
        FileNotFoundError: there is no ``log.jsonl``.
        ValueError: it has no line of a finished epoch.
    """
    figure = draw_log(read_log(Path(output_dir) / LOG_NAME), title=Path(output_dir).resolve().name)
    target = Path(output_dir) / PLOT_NAME if path is None else Path(path)
    # Whoever watches the picture while a run writes it never sees half of it.
    partial = target.with_name(f".{target.name}.tmp")
    figure.savefig(partial, format="png")
    os.replace(partial, target)
    return target


def draw_log(epochs: list[Epoch], title: str = "") -> Figure:
    """Draw the curves of ``plot_log`` from the lines of a log."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (_plot_loss, _plot_terms, _plot_ap, _plot_lr)
    legend_places = ("upper right", "upper right", "lower right", "lower left")
    for axes, panel, legend_place in zip(figure.subplots(2, 2).flat, panels, legend_places, strict=True):
        panel(axes, epochs)
        _style(axes, epochs, legend_place)
    figure.suptitle(title)
    return figure


def read_log(path: str | Path) -> list[Epoch]:
    """Read the epochs of a ``log.jsonl`` in order, as ``plot_log`` describes."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: output_dir must be the output folder of a training run")
    epochs = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        record = _parse(line)
        if record is not None:
            epochs[record["epoch"]] = record
    if not epochs:
        raise ValueError(f"{path} has no line of a finished epoch yet")
    return [epochs[number] for number in sorted(epochs)]


def _parse(line: str) -> Epoch | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or math.isnan(_number(record.get("epoch"))):
        return None
    return record


def _number(value: Any) -> float:
    """Give a finite number as float, anything else as NaN, which matplotlib leaves out."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else math.nan


def _curve(epochs: Iterable[Mapping[str, Any]], key: str, inside: str | None = None) -> list[float]:
    records = (epoch if inside is None else epoch.get(inside) for epoch in epochs)
    return [_number(record.get(key)) if isinstance(record, dict) else math.nan for record in records]


def _plot_curve(axes: Axes, epochs: list[Epoch], values: list[float], **style: Any) -> None:
    """Plot a curve unless it has no value; lone values show as points."""
    points = [(epoch["epoch"], value) for epoch, value in zip(epochs, values, strict=True) if not math.isnan(value)]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) <= 30 else None, markersize=3.5, **style)


def _plot_loss(axes: Axes, epochs: list[Epoch]) -> None:
    _plot_curve(axes, epochs, _curve(epochs, "train_loss"), color=BLUE, label="training")
    _plot_curve(axes, epochs, _curve(epochs, "val_loss"), color=RED, label="validation")
    axes.set_title("loss, all terms and layers")


def _plot_terms(axes: Axes, epochs: list[Epoch]) -> None:
    found = {match[1] for epoch in epochs for match in map(TERM.fullmatch, epoch) if match}
    for term in sorted(found, key=lambda term: [*TERM_COLORS, term].index(term)):
        color = TERM_COLORS.get(term, "gray")
        _plot_curve(axes, epochs, _curve(epochs, f"train_loss_{term}"), color=color, label=term)
        _plot_curve(axes, epochs, _curve(epochs, f"val_loss_{term}"), color=color, linestyle="--")
    if any(line.get_linestyle() == "--" for line in axes.lines):
        axes.plot([], [], color="black", linestyle="--", label="validation")
    # Over less than this a logarithmic axis has hardly a label.
    _log_scale(axes, least_span=5)
    axes.set_title("loss of the last layer by term")


def _plot_ap(axes: Axes, epochs: list[Epoch]) -> None:
    kind = next((kind for kind in SCORES if any(kind in epoch for epoch in epochs)), "coco_bbox")
    title, colors = SCORES[kind]
    for name, color in colors.items():
        # COCO's -1 says that there was nothing to measure.
        values = [100 * score if score >= 0 else math.nan for score in _curve(epochs, name, inside=kind)]
        _plot_curve(axes, epochs, values, color=color, label=_with_best(name, values))
    # An AP of one percent at least in view: the noise about zero of the first epochs is no rise.
    axes.set_ylim(0, max(1.0, 1.05 * axes.dataLim.y1) if axes.lines else None)
    axes.set_title(f"{title} on validation images, in percent")


def _with_best(name: str, values: list[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{name}, best {max(known):.1f}" if known else name


def _plot_lr(axes: Axes, epochs: list[Epoch]) -> None:
    names = sorted({key for epoch in epochs for key in epoch if key.startswith(("lr", "train_lr"))})
    for name, color in zip(names, (BLUE, ORANGE, GREEN, PINK, SKY, RED), strict=False):
        _plot_curve(axes, epochs, _curve(epochs, name), color=color, label=name)
    _log_scale(axes)
    axes.set_title("learning rate")


def _log_scale(axes: Axes, least_span: float = 1.0) -> None:
    """Scale by powers of ten where all values can be shown so and the largest is ``least_span`` times the smallest."""
    lowest, highest = axes.dataLim.y0, axes.dataLim.y1
    if axes.lines and lowest > 0 and highest >= least_span * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(_label_of_minor_tick)


def _label_of_minor_tick(value: float, position: float) -> str:
    """Label 2 and 5 of each power of ten; labels at all nine would run into each other."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _style(axes: Axes, epochs: list[Epoch], legend_place: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first, last = epochs[0]["epoch"], epochs[-1]["epoch"]
    margin = max(0.02 * (last - first), 0.5)
    axes.set_xlim(first - margin, last + margin)
    if axes.lines:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc=legend_place)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", color="gray")
