"""Prediction on videos: what is written, in which order, and what is never half there."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import Fixed, noise, one_box, small_detr
from torch import Tensor, nn

from detr_fast import ImageBatch
from detr_fast.data.find import find_images_and_videos
from detr_fast.predict_video import predict_inputs, predict_videos
from detr_fast.predictor import Predictor

pytest.importorskip("av", reason="needs PyAV, which the test extra installs")

from test_video import make_video, read


class Brightness(nn.Module):
    """One box in the middle whose score is the picture's first channel, mapped from its range to [0.1, 0.9]."""

    def forward(self, samples: ImageBatch) -> dict[str, Tensor]:
        mean = samples.images[:, 0].mean((1, 2))
        score = torch.sigmoid(mean)[:, None, None]
        logits = torch.cat((torch.full_like(score, 1e-9), score, 1 - score), 2).log()
        return {"pred_logits": logits, "pred_boxes": torch.full((len(samples), 1, 4), 0.5)}


def fading(count: int) -> list[np.ndarray]:
    """Pictures that get brighter from frame to frame."""
    return [np.full((48, 64, 3), 10 + 220 * number // count, np.uint8) for number in range(count)]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_frames_stay_in_order(tmp_path: Path, threads: int, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr_fast.pipeline.spare_cores", lambda device: threads)
    before = threading.active_count()
    stamps = [number**2 for number in range(30)]
    path = make_video(tmp_path / "a.mkv", fading(30), stamps=stamps)
    predictor = Predictor(Brightness(), {1: "light"}, threshold=0.0, batch_size=batch_size, size=32)
    done: list[int] = []
    (summary,) = predict_videos([path], predictor, tmp_path / "out", on_progress=lambda path, count: done.append(count))
    assert summary.ok and summary.frames == summary.found == 30 and done == list(range(1, 31)) and not summary.notes
    assert summary.results == tmp_path / "out" / "a.jsonl"
    lines = lines_of(tmp_path / "out" / "a.jsonl")
    assert [line["frame"] for line in lines] == list(range(30))
    assert [round(1000 * line["time"]) for line in lines] == stamps
    scores = [line["detections"][0]["score"] for line in lines]
    assert scores == sorted(scores) and len(set(scores)) == 30, "detections belong to another frame"
    first = lines[0]["detections"][0]
    assert first["category"] == "light" and first["category_id"] == 1 and first["bbox"] == [16, 12, 32, 24]
    assert (lines[0]["width"], lines[0]["height"]) == (64, 48)
    frames, lost = read(tmp_path / "out" / "a.mp4")
    assert [round(1000 * frame.time) for frame in frames] == stamps and not lost
    # A corner that neither box nor label reaches.
    corners = [np.asarray(frame.picture(), dtype=float)[-20:-4, -20:-4].mean() for frame in frames]
    assert corners == sorted(corners) and corners[-1] - corners[0] > 150, "pictures are in another order"
    assert frames[0].picture().size == (448, 336), "a small picture is enlarged"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jsonl", "a.mp4"]
    assert re.search(r"images per second, bounded by", summary.render())
    assert threading.active_count() == before


def test_boxes_are_drawn(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", [np.zeros((400, 400, 3), np.uint8)] * 3)
    predict_videos([path], Predictor(one_box(), size=32), tmp_path / "out")
    for frame in read(tmp_path / "out" / "a.mp4")[0]:
        pixels = np.asarray(frame.picture(), dtype=int)
        assert pixels[150:250, 98:103].max() > 60, "the left edge of the box"
        assert pixels[300:, :].max() < 20, "below it is nothing"


def test_each_third_frame(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 10)
    model = one_box()
    (summary,) = predict_videos([path], Predictor(model, size=32), tmp_path / "out", every=3)
    assert [line["frame"] for line in lines_of(tmp_path / "out" / "a.jsonl")] == [0, 3, 6, 9]
    assert [round(frame.time, 3) for frame in read(tmp_path / "out" / "a.mp4")[0]] == [0, 0.12, 0.24, 0.36]
    assert summary.frames == len(model.seen) == 4
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        predict_videos([path], Predictor(model), tmp_path / "out", every=0)


def test_a_turned_video_comes_out_upright(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", [np.zeros((400, 500, 3), np.uint8)] * 2, rotation=-90)
    model = one_box()
    predict_videos([path], Predictor(model, size=32), tmp_path / "out")
    assert model.seen[0].images.shape[-2:] == (40, 32)
    (frame, _), _ = read(tmp_path / "out" / "a.mp4")
    assert frame.picture().size == (400, 500) and frame.decoded.rotation == 0


def test_one_broken_video_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    make_video(tmp_path / "b.mp4")
    whole = make_video(tmp_path / "c.mkv", 50).read_bytes()
    (tmp_path / "c.mkv").write_bytes(whole[: len(whole) // 2])
    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "c.mkv"]
    summaries = predict_videos(paths, Predictor(one_box(), size=32), tmp_path / "out")
    assert [summary.ok for summary in summaries] == [False, True, True]
    assert "failed: " in summaries[0].render() and "Invalid data" in summaries[0].failure
    assert not summaries[1].notes and 5 < summaries[2].frames < 45
    assert re.search(r"c\.mkv: the last frame ends at .* of the 2\.00 s", summaries[2].render())
    assert sorted(path.stem for path in (tmp_path / "out").glob("*")) == ["b", "b", "c", "c"]


@pytest.mark.parametrize("threads", [0, 3])
def test_interrupted_run(tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes the final name, and what was done can be read."""
    monkeypatch.setattr("detr_fast.pipeline.spare_cores", lambda device: threads)
    before = threading.active_count()
    path = make_video(tmp_path / "a.mp4", 60)

    def interrupt(path: Path, count: int) -> None:
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_videos([path], Predictor(one_box(), size=32), tmp_path / "out", on_progress=interrupt)
    assert threading.active_count() == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a.partial.mp4", "a.partial.jsonl"}
    lines = lines_of(tmp_path / "out" / "a.partial.jsonl")
    frames, _ = read(tmp_path / "out" / "a.partial.mp4")
    assert 5 <= len(lines) == len(frames) < 60


def test_a_model_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr_fast.pipeline.spare_cores", lambda device: 2)

    class Broken(Fixed):
        def forward(self, samples: ImageBatch) -> dict[str, Tensor]:
            raise RuntimeError("no memory left")

    path = make_video(tmp_path / "a.mp4", 60)
    with pytest.raises(RuntimeError, match="no memory left"):
        predict_videos([path], Predictor(Broken([[0.9]], [[0.5] * 4]), size=32), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4")
    monkeypatch.delitem(sys.modules, "detr_fast.video")
    monkeypatch.setitem(sys.modules, "av", None)
    noise(32, 32).save(tmp_path / "b.png")
    images, video = predict_inputs(tmp_path, Predictor(one_box(), size=32), tmp_path / "out")
    assert images.ok and not video.ok
    assert re.search(r"failed: .*a\.mp4: .*pip install 'detr_fast\[video\]'", video.render())
    assert (tmp_path / "out" / "b.jpg").is_file() and path.is_file()


def test_images_and_videos_together(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    names = ["b.mp4", "b.mkv", "deep/b.MP4", "clip.0001.mp4"]
    for name in names:
        make_video(folder / name, 2, format="matroska" if name.endswith("mkv") else "mp4")
    noise(32, 32).save(folder / "b.png")
    (folder / "code.ts").touch()
    assert len(find_images_and_videos(folder)[1]) == 3
    assert find_images_and_videos(folder / "code.ts") == ([], [folder / "code.ts"])
    summaries = predict_inputs(folder, Predictor(one_box(), size=32), tmp_path / "out", recursive=True)
    assert len(summaries) == 5 and all(summary.ok for summary in summaries)
    expected = {"b.jpg", "images.json", "predictions.json"}
    expected |= {stem + end for stem in ("b", "b_2", "b_3", "clip.0001") for end in (".mp4", ".jsonl")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    video = folder / "b.mp4"
    with pytest.raises(ValueError, match=r"attention is of images, and .*b\.mp4 is a video"):
        predict_inputs(video, Predictor(one_box()), tmp_path / "out", attention=True)
    with pytest.raises(FileNotFoundError, match="holds no image or video"):
        (tmp_path / "empty").mkdir()
        predict_inputs(tmp_path / "empty", Predictor(one_box()), tmp_path / "out")


def test_a_video_is_never_replaced(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"output must be another folder: .*a\.mp4 would be replaced"):
        predict_videos([path], Predictor(one_box()), tmp_path)
    assert path.read_bytes() == before


def test_panoptic(tmp_path: Path) -> None:
    from test_predict_panoptic import halves

    path = make_video(tmp_path / "a.mp4", 3)
    (summary,) = predict_videos([path], halves(), tmp_path / "out", panoptic=0.85)
    assert summary.ok
    for number, line in enumerate(lines_of(tmp_path / "out" / "a.jsonl")):
        assert line["file_name"] == f"a_{number:06}.png"
        with Image.open(tmp_path / "out" / "panoptic" / line["file_name"]) as segments:
            ids = {red + 256 * green + 65536 * blue for _, (red, green, blue) in segments.getcolors()}
        assert {segment["id"] for segment in line["segments"]} == ids - {0} and line["segments"]
        assert all({"category", "category_id", "area"} <= segment.keys() for segment in line["segments"])
    with pytest.raises(TypeError, match="a panoptic segmentation needs a model with a mask head"):
        predict_videos([path], Predictor(small_detr()), tmp_path / "out2", panoptic=0.85)
    assert not (tmp_path / "out2" / "a.mp4").exists()
