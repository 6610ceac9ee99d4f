"""Curves of a training run, drawn from its ``log.jsonl``."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_NAME = "log.jsonl"
PLOT_NAME = "curves.png"

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
TERM_COLORS = {"ce": BLUE, "bbox": ORANGE, "giou": GREEN, "mask": PINK, "dice": SKY}
AP_COLORS = {"AP": BLUE, "AP50": ORANGE, "AP75": GREEN}
# Auxiliary layers ("loss_ce_3") and unweighted copies ("loss_ce_unscaled") would hide the terms themselves.
TERM = re.compile(r"train_loss_([a-z]+)")

Epoch = dict[str, Any]


def plot_log(output_dir: str | Path, path: str | Path | None = None) -> Path:
    """Draw the losses, AP and learning rates of a run over its epochs.

    A line of the log that cannot be read (a killed run leaves half a line) is skipped, a key that is missing or not a
    number leaves a gap, and of an epoch that was run again after a resume the last line counts.

    Args:
        output_dir: the folder of the run; its ``log.jsonl`` is read.
        path: the PNG to write; None takes ``curves.png`` in ``output_dir``.

    Returns:
        The path of the PNG.

    Raises:
        FileNotFoundError: there is no ``log.jsonl``.
        ValueError: it has no line of a finished epoch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = read_log(Path(output_dir) / LOG_NAME)
    target = Path(output_dir) / PLOT_NAME if path is None else Path(path)
    figure = Figure(figsize=(12, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Sequence[Callable[[Axes, list[Epoch]], None]] = (_plot_loss, _plot_terms, _plot_ap, _plot_lr)
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        panel(axes, epochs)
        _style(axes)
    figure.suptitle(Path(output_dir).resolve().name)
    # Whoever watches the picture while a run writes it never sees half of it.
    partial = target.with_name(target.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, target)
    return target


def read_log(path: str | Path) -> list[Epoch]:
    """Read the epochs of a ``log.jsonl`` in order, as ``plot_log`` describes."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: output_dir must be the output folder of a training run")
    epochs = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
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
    for term in sorted(found, key=lambda term: (term not in TERM_COLORS, term)):
        color = TERM_COLORS.get(term, "gray")
        _plot_curve(axes, epochs, _curve(epochs, f"train_loss_{term}"), color=color, label=term)
        _plot_curve(axes, epochs, _curve(epochs, f"val_loss_{term}"), color=color, linestyle="--")
    if any(line.get_linestyle() == "--" for line in axes.lines):
        axes.plot([], [], color="black", linestyle="--", label="validation")
    _log_scale(axes)
    axes.set_title("loss of the last layer by term")


def _plot_ap(axes: Axes, epochs: list[Epoch]) -> None:
    for name, color in AP_COLORS.items():
        values = [100 * value for value in _curve(epochs, name, inside="coco_bbox")]
        _plot_curve(axes, epochs, values, color=color, label=_with_best(name, values))
    axes.set_ylim(bottom=0)
    axes.set_title("box AP on validation images, in percent")


def _with_best(name: str, values: list[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{name}, best {max(known):.1f}" if known else name


def _plot_lr(axes: Axes, epochs: list[Epoch]) -> None:
    names = sorted({key for epoch in epochs for key in epoch if key.startswith(("lr", "train_lr"))})
    for name, color in zip(names, (BLUE, ORANGE, GREEN, PINK, SKY, RED), strict=False):
        _plot_curve(axes, epochs, _curve(epochs, name), color=color, label=name)
    _log_scale(axes)
    axes.set_title("learning rate")


def _log_scale(axes: Axes) -> None:
    """Scale by powers of ten, but only where every value can be shown so."""
    lowest = axes.dataLim.y0
    if axes.lines and lowest > 0:
        axes.set_yscale("log")


def _style(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", color="gray")
