"""Prediction in Python and on files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor, nn

from detr_fast import Detr, ImageBatch, Transformer
from detr_fast.build import model_from_args
from detr_fast.checkpoint import CheckpointError, save_checkpoint
from detr_fast.data.annotations import AnnotationError
from detr_fast.data.images import ImageError
from detr_fast.predict import AttentionFigures, Prediction, Predictor, find_images, predict_files


class Patches(nn.Module):
    """A backbone that sees 16 x 16 pixels a token and nothing beyond them."""

    num_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, stride=16)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return self.conv(nn.functional.pad(images, (0, -width % 16, 0, -height % 16)))


class Fixed(nn.Module):
    """A model with the same answer for each image, given as scores [Q, C] of the classes and boxes cxcywh [Q, 4]."""

    def __init__(self, scores: list[list[float]], boxes: list[list[float]]) -> None:
        super().__init__()
        probabilities = torch.tensor(scores)
        nothing = 1 - probabilities.sum(1, keepdim=True)
        self.logits = torch.cat((probabilities, nothing), 1).clamp(min=1e-9).log()
        self.boxes = torch.tensor(boxes)
        self.seen: list[ImageBatch] = []

    def forward(self, samples: ImageBatch) -> dict[str, Tensor]:
        self.seen.append(samples)
        repeat = (len(samples), 1, 1)
        return {"pred_logits": self.logits.repeat(repeat), "pred_boxes": self.boxes.repeat(repeat)}


def one_box() -> Fixed:
    return Fixed([[0.0, 0.9]], [[0.5, 0.5, 0.5, 0.25]])


def small_detr(num_layers: int = 2) -> Detr:
    transformer = Transformer(
        d_model=16,
        nhead=2,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        dim_feedforward=16,
        return_intermediate_dec=True,
    )
    model = Detr(Patches(), transformer, num_classes=5, num_queries=7)
    # Random weights as they come make all attention nearly even.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.randint(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, size: tuple[int, int] = (64, 48), **how: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(*size).save(path, **how)
        return path

    return make


def assert_same(left: Prediction, right: Prediction, atol: float = 0.0) -> None:
    assert left.labels.tolist() == right.labels.tolist() and left.size == right.size
    torch.testing.assert_close(left.scores, right.scores, atol=atol, rtol=0)
    torch.testing.assert_close(left.boxes_xyxy_px, right.boxes_xyxy_px, atol=100 * atol, rtol=0)


class TestPredictor:
    def test_thresholds_sorts_names_and_scales(self) -> None:
        scores = [[0.1, 0.75, 0.0], [0.3, 0.3, 0.0], [0.9, 0.05, 0.0], [0.0, 0.0, 0.71]]
        boxes = [[0.5, 0.5, 0.2, 0.4], [0.1] * 4, [0.25, 0.5, 0.5, 1.0], [0.9, 0.9, 0.4, 0.4]]
        predictor = Predictor(Fixed(scores, boxes), {0: "cat", 1: "dog"})
        (found,) = predictor(noise(200, 100))
        assert found.names == ["cat", "dog", "class 2"] and len(found) == 3
        assert found.labels.tolist() == [0, 1, 2] and found.queries.tolist() == [2, 0, 3]
        torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.75, 0.71]))
        expected = [[0.0, 0, 100, 100], [80, 30, 120, 70], [140, 70, 220, 110]]
        torch.testing.assert_close(found.boxes_xyxy_px, torch.tensor(expected))
        assert found.size == (100, 200)

    def test_nothing_found(self) -> None:
        (found,) = Predictor(Fixed([[0.2, 0.2]], [[0.5] * 4]))(noise(20, 10))
        assert len(found) == 0 and found.boxes_xyxy_px.shape == (0, 4) and found.to_coco(1) == []
        assert found.labels.dtype == torch.int64 and found.centres_px() == []

    def test_takes_every_kind_of_image(self, make_image: Callable[..., Path]) -> None:
        path = make_image("a.png")
        picture = Image.open(path).convert("RGB")
        array = np.array(picture)
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        predictor = Predictor(small_detr(), threshold=0.0, size=64)
        kinds = [picture, path, str(path), array, tensor, tensor / 255, tensor.double() / 255, array[:, ::-1][:, ::-1]]
        found = predictor(kinds)
        assert len(found) == len(kinds) and len(found[0]) == 7
        for other in found[1:]:
            assert_same(found[0], other)
        for alone in kinds:
            assert_same(found[0], predictor(alone)[0])
        assert_same(found[0], predictor(tensor[None])[0])

    def test_grey_and_palette(self) -> None:
        predictor = Predictor(small_detr(), threshold=0.0, size=64)
        grey = noise(64, 64).convert("L")
        for same in (np.array(grey), grey.convert("RGB"), grey.convert("P")):
            assert_same(predictor(grey)[0], predictor(same)[0])

    def test_batches_of_mixed_sizes_change_nothing(self) -> None:
        # Sides are multiples of the backbone's 16 pixels, so padding meets no token.
        images = [noise(64, 64), noise(96, 64), noise(64, 128), noise(64, 80), noise(128, 64)]
        model = small_detr()
        one = Predictor(model, threshold=0.0, size=64)(images)
        three = Predictor(model, threshold=0.0, size=64, batch_size=3)(images)
        assert len({tuple(found.scores.tolist()) for found in one}) == 5
        for left, right in zip(one, three, strict=True):
            assert_same(left, right, atol=1e-4)

    def test_scales_to_size(self) -> None:
        model = one_box()
        Predictor(model, size=64, max_size=100, batch_size=2)([noise(60, 30), noise(30, 45)])
        assert [tuple(batch.images.shape) for batch in model.seen] == [(2, 3, 96, 100)]
        shown = ~model.seen[0].mask
        assert [(m.any(1).sum().item(), m.any(0).sum().item()) for m in shown] == [(50, 100), (96, 64)]

    @pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2)])
    def test_extreme_shapes(self, size: tuple[int, int]) -> None:
        predictor = Predictor(model_from_args(tiny_args()), threshold=0.0, size=64, max_size=128)
        (found,) = predictor(noise(*size))
        assert found.size == size[::-1] and found.boxes_xyxy_px.isfinite().all() and len(found) > 0

    def test_leaves_modes_and_gradients_as_they_were(self) -> None:
        model = small_detr().train()
        model.backbone.eval()
        modes = [module.training for module in model.modules()]
        first = Predictor(model, threshold=0.0, size=64)(image := noise(64, 64))[0]
        assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
        assert_same(first, Predictor(model, threshold=0.0, size=64)(image)[0])  # dropout would differ
        assert not first.scores.requires_grad
        model(torch.randn(1, 3, 32, 32))["pred_logits"].sum().backward()
        with pytest.raises(ValueError, match="must be"):
            Predictor(model)(torch.zeros(2, 2))
        assert [module.training for module in model.modules()] == modes

    def test_coco_results(self) -> None:
        (found,) = Predictor(Fixed([[0.0, 0.75]], [[0.5, 0.5, 0.5, 0.25]]))(noise(200, 100))
        assert found.to_coco(139) == [
            {"image_id": 139, "category_id": 1, "bbox": [50.0, 37.5, 100.0, 25.0], "score": pytest.approx(0.75)}
        ]

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([], "images must hold at least one image"),
            (np.zeros((4, 4, 3)), r"uint8 \[height, width, 3\] or \[height, width\], got float64 \[4, 4, 3\]"),
            (np.zeros((3, 9, 9), np.uint8), r"got uint8 \[3, 9, 9\]"),
            (np.zeros((0, 9, 3), np.uint8), r"got uint8 \[0, 9, 3\]"),
            (torch.zeros(9, 9, 3), r"an image tensor must be \[3, height, width\], got \[9, 9, 3\]"),
            (torch.full((3, 4, 4), 200.0), "must be in .0, 1. and not normalised, got values from 200 to 200"),
            (torch.full((3, 4, 4), float("nan")), "must be in .0, 1.*got values from nan"),
            (torch.zeros(3, 4, 4, dtype=torch.int64), "must be uint8 or floating point, got torch.int64"),
        ],
    )
    def test_bad_images(self, images: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Predictor(one_box())(images)

    def test_bad_types_and_files(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="PIL images, arrays, tensors or paths, got int"):
            Predictor(one_box())([3])  # type: ignore[list-item]
        with pytest.raises(ImageError, match="missing.jpg"):
            Predictor(one_box())(tmp_path / "missing.jpg")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
            ({"size": 0}, "size must be at least 1, got 0"),
            ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Predictor(one_box(), **settings)


def tiny_args(**changes: Any) -> SimpleNamespace:
    sizes = {"hidden_dim": 16, "nheads": 2, "enc_layers": 1, "dec_layers": 1, "dim_feedforward": 16, "num_queries": 5}
    return SimpleNamespace(**({"backbone": "tiny", "num_classes": 4} | sizes | changes))


def test_from_checkpoint_has_names_and_sizes(tmp_path: Path) -> None:
    args = tiny_args()
    model = model_from_args(args).eval()
    path = tmp_path / "checkpoint.pth"
    sizes = {"scales": [64, 96], "max_size": 120}
    categories = {number: f"thing {number}" for number in range(4)}
    save_checkpoint({"model": model.state_dict(), "args": vars(args) | sizes, "categories": categories}, path)
    image = noise(100, 80)
    (found,) = Predictor.from_checkpoint(path, threshold=0.0)(image)
    assert_same(found, Predictor(model, threshold=0.0, size=96, max_size=120)(image)[0])
    assert found.names == [categories[label] for label in found.labels.tolist()] and found.names
    other = Predictor.from_checkpoint(path, threshold=0.0, size=64)(image)[0]
    assert not torch.equal(other.scores, found.scores)
    with pytest.raises(CheckpointError, match="nothing.pth"):
        Predictor.from_checkpoint(tmp_path / "nothing.pth")


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
        for i in range(4):
            make_image(f"in/{i}.png")

        def interrupt(done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            predict_files(tmp_path / "in", Predictor(one_box()), tmp_path / "out", on_progress=interrupt)
        assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 2
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["0.jpg", "1.jpg", "images.json", "predictions.json"]

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
