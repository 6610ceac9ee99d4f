"""Prediction on files: which are found, what is written, and what is never lost."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from stand_ins import Fixed, noise, one_box, small_detr, tiny_args

from detr_fast.build import model_from_args
from detr_fast.checkpoint import CheckpointError
from detr_fast.data.annotations import AnnotationError
from detr_fast.predict import AttentionFigures, Predictor, find_images, predict_files


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, size: tuple[int, int] = (64, 48), **how: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(*size).save(path, **how)
        return path

    return make


class TestFindImages:
    def names(self, *inputs: Any, **how: Any) -> list[str]:
        return [path.name for path in find_images(inputs, **how)]

    def test_files_folders_and_patterns(self, tmp_path: Path) -> None:
        for name in ("b.jpg", "a.PNG", "c.txt", "deep/d.jpg", "deep/er/e.tif", "odd[1].jpg", "f.dat"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        assert self.names(tmp_path) == ["a.PNG", "b.jpg", "odd[1].jpg"]
        assert self.names(tmp_path, recursive=True) == ["a.PNG", "b.jpg", "d.jpg", "e.tif", "odd[1].jpg"]
        assert self.names(f"{tmp_path}/*") == ["a.PNG", "b.jpg", "odd[1].jpg"]
        assert self.names(f"{tmp_path}/*.dat") == ["f.dat"]
        assert self.names(f"{tmp_path}/d*") == ["d.jpg"]
        assert self.names(f"{tmp_path}/**/*.jpg") == ["b.jpg", "d.jpg", "odd[1].jpg"]
        assert self.names(f"{tmp_path}/odd[1].jpg", tmp_path / "c.txt", tmp_path) == [
            "odd[1].jpg",
            "c.txt",
            "a.PNG",
            "b.jpg",
        ]
        assert find_images(str(tmp_path / "gone.jpg")) == [tmp_path / "gone.jpg"]

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="the folder .* holds no image"):
            find_images(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"the pattern .*\*\.jpg matches no file"):
            find_images(f"{tmp_path}/*.jpg")
        with pytest.raises(ValueError, match="at least one image, folder or pattern"):
            find_images([])


class TestPredictFiles:
    def test_writes_pictures_and_results(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        paths = [make_image("in/b.jpg", (64, 48)), make_image("in/a.png", (900, 600))]
        progress: list[tuple[int, int]] = []
        out = tmp_path / "new" / "out"
        summary = predict_files(
            tmp_path / "in", Predictor(one_box()), out, on_progress=lambda *done: progress.append(done)
        )
        assert summary.ok and progress == [(1, 2), (2, 2)]
        assert sorted(path.name for path in out.iterdir()) == ["a.jpg", "b.jpg", "images.json", "predictions.json"]
        results = json.loads((out / "predictions.json").read_text())
        assert results == summary.predictions
        assert [result["image_id"] for result in results] == [1, 2]
        assert results[0]["bbox"] == [225, 225, 450, 150] and results[0]["category_id"] == 1
        images = json.loads((out / "images.json").read_text())["images"]
        assert [(image["id"], image["file_name"]) for image in images] == [(1, str(paths[1])), (2, str(paths[0]))]
        assert Image.open(out / "a.jpg").size == (900, 600)
        assert Image.open(out / "b.jpg").size == (448, 336), "a small picture is enlarged"
        assert "2 detections in 2 images" in summary.render()

    def test_batches(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        for i in range(5):
            make_image(f"in/{i}.png", (32 + i, 32))
        model = one_box()
        predict_files(tmp_path / "in", Predictor(model, batch_size=2, size=32), tmp_path / "out")
        assert [len(batch) for batch in model.seen] == [2, 2, 1]

    def test_says_how_fast_it_was_and_what_bounded_it(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        for i in range(3):
            make_image(f"in/{i}.png")

        class Slow(Fixed):
            def forward(self, samples: Any) -> Any:
                time.sleep(0.3)
                return super().forward(samples)

        summary = predict_files(tmp_path / "in", Predictor(Slow([[0.9]], [[0.5] * 4])), tmp_path / "out")
        assert summary.speed.images == 3 and summary.speed.seconds >= 0.9
        assert summary.speed.shares["the model"] >= 0.9
        assert re.search(r"images per second, bounded by the model \(\d+% of the time\)", summary.render())

    def test_results_load_into_coco(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        paths = [make_image("in/x/1.png"), make_image("in/y/1.png"), make_image("in/new.png")]
        entries = [{"id": 40, "file_name": "y/1.png"}, {"id": 30, "file_name": "1.png", "width": 64, "height": 48}]
        truth = {"images": entries, "categories": [{"id": 1, "name": "a"}], "annotations": []}
        file = tmp_path / "truth.json"
        file.write_text(json.dumps(truth))
        summary = predict_files(paths, Predictor(one_box()), tmp_path / "out", annotations=file)
        assert [image["id"] for image in summary.images] == [30, 40, 41]
        assert summary.unannotated == [paths[2]] and "new.png is not in the annotation file" in summary.render()
        known = [result for result in summary.predictions if result["image_id"] != 41]
        coco = COCO(str(file)).loadRes(known)
        assert sorted(coco.getImgIds()) == [30, 40] and len(coco.anns) == 2

    def test_annotations_that_do_not_fit(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        paths = [make_image("in/x/1.png"), make_image("in/y/1.png")]
        for images, message in [
            ([{"id": 1, "file_name": "2.png"}], "names none of the 2 images, such as 1.png"),
            ([{"id": 1, "file_name": "1.png"}], r"x/1.png and .*y/1.png would both be image 1 \(1.png\)"),
            ([{"id": 1}], "an image needs a number 'id' and 'file_name'"),
            ([], "'images' must be a list of at least one image"),
        ]:
            with pytest.raises(AnnotationError, match=message):
                predict_files(paths, Predictor(one_box()), tmp_path / "out", annotations={"images": images})
        assert not (tmp_path / "out").exists()

    def test_every_kind_of_file(self, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        folder.mkdir()
        source = noise(60, 40)
        exif = Image.Exif()
        exif[0x0112] = 6
        source.save(folder / "turned.jpg", exif=exif)
        for mode, name in [("L", "grey.png"), ("P", "palette.png"), ("RGBA", "alpha.png"), ("CMYK", "cmyk.jpg")]:
            source.convert(mode).save(folder / name)
        Image.fromarray(np.full((40, 60), 40000, np.uint16)).save(folder / "deep.png")
        summary = predict_files(folder, Predictor(small_detr(), threshold=0.0, size=48), tmp_path / "out")
        assert summary.ok and len(summary.images) == 6
        sizes = {Path(image["file_name"]).name: (image["width"], image["height"]) for image in summary.images}
        assert sizes.pop("turned.jpg") == (40, 60) and set(sizes.values()) == {(60, 40)}
        turned = Image.open(tmp_path / "out" / "turned.jpg")
        assert turned.height > turned.width and 0x0112 not in turned.getexif()

    def test_a_broken_file_is_reported_and_skipped(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        good = [make_image("in/1.png"), make_image("in/4.png")]
        whole = make_image("whole.jpg", (200, 200)).read_bytes()
        (tmp_path / "in" / "2.jpg").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "in" / "3.png").write_text("not an image")
        model = one_box()
        inputs = [tmp_path / "in", tmp_path / "gone.jpg"]
        summary = predict_files(inputs, Predictor(model, batch_size=3), tmp_path / "out")
        assert not summary.ok
        assert [failure.path.name for failure in summary.failed] == ["2.jpg", "3.png", "gone.jpg"]
        assert [Path(image["file_name"]) for image in summary.images] == good
        assert [image["id"] for image in summary.images] == [1, 4], "ids do not depend on what failed"
        assert "failed: " in summary.render() and "3.png" in summary.render()
        failed = json.loads((tmp_path / "out" / "images.json").read_text())["failed"]
        assert [Path(entry["file_name"]).name for entry in failed] == ["2.jpg", "3.png", "gone.jpg"]

    def test_only_broken_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"")
        summary = predict_files(tmp_path / "a.png", Predictor(one_box()), tmp_path / "out")
        assert len(summary.failed) == 1 and json.loads((tmp_path / "out" / "predictions.json").read_text()) == []

    def test_files_of_one_name_are_kept_apart(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        names = ["x/1.png", "y/1.png", "y/1.jpg", "z/1_2.png", "z/V.1.png", "x/v.1.png"]
        paths = [make_image(name) for name in names]
        summary = predict_files(paths, Predictor(one_box()), tmp_path / "out")
        pictures = [image["picture"] for image in summary.images]
        assert pictures == ["1.jpg", "1_2.jpg", "1_3.jpg", "1_2_2.jpg", "V.1.jpg", "v.1_2.jpg"]
        assert all((tmp_path / "out" / picture).is_file() for picture in pictures)

    def test_inputs_are_never_replaced(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        path = make_image("in/a.jpg")
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"output must be another folder than .*a\.jpg would be replaced"):
            predict_files(path, Predictor(one_box()), tmp_path / "in" / ".." / "in")
        assert path.read_bytes() == before

    def test_output_that_cannot_be_written(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        path = make_image("a.png")
        model = one_box()
        with pytest.raises(CheckpointError, match=r"output folder .*a\.png.* cannot be written"):
            predict_files(path, Predictor(model), path / "out")
        assert not model.seen

    def test_interrupted_run_keeps_what_was_done(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        for i in range(60):
            make_image(f"in/{i:02}.png")

        def interrupt(done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            predict_files(tmp_path / "in", Predictor(one_box()), tmp_path / "out", on_progress=interrupt)
        done = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
        assert 2 <= len(done) < 60, "what was begun is finished, and no more"
        assert [image["file_name"] for image in done] == sorted(image["file_name"] for image in done)
        assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == len(done)
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == [*(image["picture"] for image in done), "images.json", "predictions.json"]

    def test_interrupted_while_writing_leaves_no_half_file(
        self, tmp_path: Path, make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths = [make_image("a.png"), make_image("b.png")]
        out = tmp_path / "out"
        predict_files(paths, Predictor(one_box()), out)
        old = (out / "b.jpg").read_bytes()
        replace = os.replace

        def interrupted(source: Any, target: Any) -> None:
            if Path(target).name == "b.jpg":
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict_files(paths, Predictor(Fixed([[0.9]], [[0.5] * 4])), out)
        assert (out / "b.jpg").read_bytes() == old and not list(out.glob(".*"))
        assert [image["picture"] for image in json.loads((out / "images.json").read_text())["images"]] == ["a.jpg"]

    def test_attention_figures(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        paths = [make_image("small.png", (40, 30)), make_image("large.png", (320, 160))]
        predictor = Predictor(small_detr(), threshold=0.0, size=64)
        summary = predict_files(paths, predictor, tmp_path / "out", attention=True)
        assert summary.ok
        assert [image["attention"] for image in summary.images] == ["small_attention.png", "large_attention.png"]
        figures = AttentionFigures(points_px=[(100, 100), (5, 5)], max_detections=1)
        summary = predict_files(paths, predictor, tmp_path / "out2", attention=figures)
        assert [failure.path for failure in summary.failed] == [paths[0]]
        assert "inside the image of 40x30 pixels, got (100, 100)" in summary.failed[0].reason
        assert "attention" not in summary.images[0] and summary.images[1]["attention"] == "large_attention.png"
        assert len(summary.images) == 2, "the detections are kept"

    def test_attention_of_another_model(self, tmp_path: Path, make_image: Callable[..., Path]) -> None:
        with pytest.raises(TypeError, match="model must be a Detr .* got Fixed"):
            predict_files(make_image("a.png"), Predictor(one_box()), tmp_path / "out", attention=True)
        assert not (tmp_path / "out").exists()


def test_real_photos(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "coco200"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    annotations = folder / "annotations" / "instances_val2017.json"
    paths = sorted((folder / "images" / "val2017").iterdir())[:3]
    predictor = Predictor(model_from_args(tiny_args(num_classes=91)), threshold=0.0, size=128, batch_size=2)
    summary = predict_files(paths, predictor, tmp_path, annotations=annotations, attention=True)
    assert summary.ok and not summary.unannotated and len(summary.predictions) == 15
    known = {image["id"]: image for image in json.loads(annotations.read_text())["images"]}
    for image in summary.images:
        assert known[image["id"]]["file_name"] == Path(image["file_name"]).name
        assert (known[image["id"]]["width"], known[image["id"]]["height"]) == (image["width"], image["height"])
    assert len(COCO(str(annotations)).loadRes(str(tmp_path / "predictions.json")).anns) == 15
