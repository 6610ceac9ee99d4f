"""The curves of a run: whole logs, and the logs that killed and resumed runs leave."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detr_fast.plots import draw_log, plot_log, read_log


def log_line(epoch: int, **values: Any) -> dict[str, Any]:
    terms = {"train_loss_ce": 1.0, "train_loss_bbox": 0.5, "train_loss_ce_0": 9.0, "val_loss_ce": 1.2}
    scores = {"coco_bbox": {"AP": 0.1 * epoch, "AP50": 0.2 * epoch}}
    return {"epoch": epoch, "train_loss": 5.0 - epoch, "val_loss": 6.0 - epoch, "lr": 1e-4} | terms | scores | values


def write_log(folder: Path, *lines: dict[str, Any] | str) -> Path:
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text)
    return folder


def curves(epochs: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """The drawn curves by panel and legend."""
    return {
        f"{axes.get_title().split(',')[0]}: {line.get_label()}": (list(line.get_xdata()), list(line.get_ydata()))
        for axes in draw_log(epochs).axes
        for line in axes.lines
    }


def test_draws_losses_terms_ap_and_learning_rate(tmp_path: Path) -> None:
    drawn = curves(read_log(write_log(tmp_path, *(log_line(e) for e in range(3))) / "log.jsonl"))
    assert drawn["loss: training"] == ([0, 1, 2], [5.0, 4.0, 3.0])
    assert drawn["loss: validation"] == ([0, 1, 2], [6.0, 5.0, 4.0])
    assert drawn["loss of the last layer by term: ce"] == ([0, 1, 2], [1.0] * 3)
    assert drawn["box AP on validation images: AP50, best 40.0"] == ([0, 1, 2], pytest.approx([0.0, 20.0, 40.0]))
    assert drawn["learning rate: lr"] == ([0, 1, 2], [1e-4] * 3)
    assert not any("ce_0" in name for name in drawn)


def test_writes_a_png_into_the_run(tmp_path: Path) -> None:
    path = plot_log(write_log(tmp_path, *(log_line(e) for e in range(3))))
    assert path == tmp_path / "curves.png"
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]


def test_half_a_line_is_skipped(tmp_path: Path) -> None:
    write_log(tmp_path, log_line(0), '{"epoch": 7, "train_lo\n', log_line(1), "\n", "[1, 2]\n", '{"epoch": 2, "train')
    assert [record["epoch"] for record in read_log(tmp_path / "log.jsonl")] == [0, 1]


def test_of_a_repeated_epoch_the_last_counts(tmp_path: Path) -> None:
    write_log(tmp_path, *(log_line(e) for e in (0, 1, 2)), log_line(1, train_loss=0.25), log_line(2, train_loss=0.125))
    assert curves(read_log(tmp_path / "log.jsonl"))["loss: training"] == ([0, 1, 2], [5.0, 0.25, 0.125])


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "much", True])
def test_what_is_no_number_is_left_out(tmp_path: Path, bad: Any) -> None:
    write_log(tmp_path, log_line(0), log_line(1, train_loss=bad, coco_bbox=bad), log_line(2))
    drawn = curves(read_log(tmp_path / "log.jsonl"))
    assert drawn["loss: training"] == ([0, 2], [5.0, 3.0])
    assert drawn["box AP on validation images: AP50, best 40.0"][0] == [0, 2]
    plot_log(tmp_path)


def test_minus_one_of_coco_is_no_ap(tmp_path: Path) -> None:
    drawn = curves([log_line(0, coco_bbox={"AP": -1, "AP50": -1}), log_line(1)])
    assert drawn["box AP on validation images: AP, best 10.0"][0] == [1]


def test_one_epoch_and_missing_keys(tmp_path: Path) -> None:
    plot_log(write_log(tmp_path, {"epoch": 0, "train_loss": 3.0}))
    texts = [text.get_text() for axes in draw_log(read_log(tmp_path / "log.jsonl")).axes for text in axes.texts]
    assert texts == ["not in the log"] * 3


@pytest.mark.parametrize(("lowest", "scale"), [(0.01, "log"), (0.9, "linear"), (0.0, "linear")])
def test_scale_of_the_terms(lowest: float, scale: str) -> None:
    figure = draw_log([log_line(0), log_line(1, train_loss_ce=lowest)])
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", scale, "linear", "log"]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl does not exist: output_dir must be"):
        plot_log(tmp_path)
    with pytest.raises(ValueError, match="no line of a finished epoch"):
        plot_log(write_log(tmp_path, '{"train_loss": 1.0}\n', '{"epoch"'))
