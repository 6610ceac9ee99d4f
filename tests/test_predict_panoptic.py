"""Panoptic prediction: from a checkpoint to segments, pictures, PNGs and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import noise, small_detr, tiny_args
from test_train_masks import panoptic_config
from torch import Tensor
from typer.testing import CliRunner

from detr_fast import Predictor
from detr_fast.build import COCO_THINGS, model_from_args, model_from_checkpoint
from detr_fast.checkpoint import load_checkpoint, save_checkpoint
from detr_fast.cli import app
from detr_fast.data.coco_panoptic import CocoPanoptic, read_segment_ids
from detr_fast.drawing import class_color, draw_segments
from detr_fast.models.segmentation import DetrSegm
from detr_fast.panoptic_prediction import PanopticPrediction
from detr_fast.postprocess_masks import Segments
from detr_fast.predict import predict_files
from detr_fast.train import train

THINGS = {1: True, 3: False}
NAMES = {1: "red", 3: "green"}


class Halves(DetrSegm):
    """Finds the image's left half to be a thing, the right half stuff, whatever the image."""

    def __init__(self) -> None:
        super().__init__(model_from_args(resnet_args(masks=True)).detr)

    def forward(self, samples: object, **_: object) -> dict[str, Tensor]:
        logits, masks = torch.zeros(len(samples), 5, 5), torch.full((len(samples), 5, 8, 8), -9.0)
        logits[:, :, 4] = 30
        logits[:, 1, 3] = logits[:, 3, 1] = 60
        masks[:, 3, :, :4] = masks[:, 1, :, 4:] = 9
        return {"pred_logits": logits, "pred_masks": masks, "pred_boxes": torch.rand(len(samples), 5, 4)}


def resnet_args(**changes: object) -> object:
    return tiny_args(backbone="resnet18", **changes)


def halves(**settings: object) -> Predictor:
    return Predictor(Halves(), NAMES, is_thing_map=THINGS, size=32, **settings)


def test_segments_in_the_images_own_pixels() -> None:
    first, second = halves(batch_size=2).panoptic([noise(60, 40), noise(21, 50)])
    assert first.size == (40, 60) and second.size == (50, 21) and len(first) == 2
    assert first.names == ["green", "red"]
    assert first.segments_info == [
        {"id": 1, "isthing": False, "category_id": 3, "area": 1200},
        {"id": 2, "isthing": True, "category_id": 1, "area": 1200},
    ]
    assert first.ids[:, :30].unique().tolist() == [2] and first.ids[:, 30:].unique().tolist() == [1]
    # The second one fills two thirds of the frame's width, of which the left half is three quarters of the image.
    assert second.ids[:, :15].unique().tolist() == [2] and second.ids[:, 17:].unique().tolist() == [1]


def test_nothing_found_is_no_segment() -> None:
    (found,) = halves().panoptic(noise(30, 20), threshold=1.0)
    assert len(found) == 0 and found.ids.tolist() == np.zeros((20, 30)).tolist()
    empty = PanopticPrediction.of(Segments(torch.zeros(2, 2, dtype=torch.int64), []), {})
    assert empty.ids.unique().tolist() == [0]


def test_what_is_needed_is_named() -> None:
    with pytest.raises(TypeError, match="needs a model with a mask head, got a Detr"):
        Predictor(small_detr(), is_thing_map=THINGS).panoptic(noise(9, 9))
    with pytest.raises(ValueError, match="is_thing_map must say which classes are things"):
        Predictor(Halves()).panoptic(noise(9, 9))
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        halves().panoptic(noise(9, 9), threshold=2)


def test_files_are_cocos_panoptic_format(tmp_path: Path) -> None:
    for name in ("a", "b"):
        noise(60, 40).save(tmp_path / f"{name}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    summary = predict_files(tmp_path, halves(), tmp_path / "out", panoptic=0.85)
    assert "4 segments in 2 images" in summary.render() and len(summary.failed) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("a.jpg", "b.jpg", "panoptic", "panoptic.json", "images.json")
    }
    data = CocoPanoptic(tmp_path, tmp_path / "out" / "panoptic", tmp_path / "out" / "panoptic.json")
    assert len(data) == 2 and data.categories[1] == "red" and data.is_thing_map == {0: True, 1: True, 2: True, 3: False}
    _, target = data[1]
    assert target["labels"].tolist() == [3, 1] and target["area"].tolist() == [1200, 1200]
    with Image.open(tmp_path / "out" / "a.jpg") as picture:
        assert picture.size == (420, 280)
    with pytest.raises(ValueError, match="would be replaced by a drawing"):
        predict_files(tmp_path / "out" / "panoptic", halves(), tmp_path / "out", panoptic=0.85)
    with pytest.raises(TypeError, match="needs a model with a mask head"):
        predict_files(tmp_path, Predictor(small_detr()), tmp_path / "out2", panoptic=0.85)
    assert not (tmp_path / "out2").exists()


def test_from_training_to_a_picture(tmp_path: Path) -> None:
    result = train(panoptic_config(tmp_path))
    path = result.output / "checkpoint.pth"
    assert load_checkpoint(path)["is_thing_map"] == THINGS and model_from_checkpoint(path)[1].is_thing_map == THINGS
    arguments = ["predict", tmp_path / "val" / "1.jpg", "--checkpoint", path, "--output", tmp_path / "out"]
    run = CliRunner().invoke(app, [str(a) for a in [*arguments, "--panoptic", "--threshold", 0.0, "--device", "cpu"]])
    assert run.exit_code == 0, run.output
    contents = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert {"id": 3, "name": "green", "isthing": 0} in contents["categories"]
    (entry,) = contents["annotations"]
    ids = read_segment_ids(tmp_path / "out" / "panoptic" / entry["file_name"])
    assert ids.shape == (40, 48)
    assert set(np.unique(ids)) - {0} == {info["id"] for info in entry["segments_info"]}


def test_published_weights_know_cocos_things(tmp_path: Path) -> None:
    """They say neither names nor things; a file of categories does."""
    args = resnet_args(masks=True, num_classes=250)
    save_checkpoint({"model": model_from_args(args).state_dict()}, tmp_path / "a.pth")
    model, meta = model_from_checkpoint(tmp_path / "a.pth")
    assert model.detr.transformer.nhead == 2
    assert meta.is_thing_map == COCO_THINGS and meta.categories == {}
    assert [meta.is_thing_map[number] for number in (1, 90, 92, 200)] == [True, True, False, False]
    save_checkpoint({"model": model_from_args(resnet_args(masks=True)).state_dict()}, tmp_path / "b.pth")
    assert model_from_checkpoint(tmp_path / "b.pth")[1].is_thing_map == {}
    noise(40, 30).save(tmp_path / "a.jpg")
    arguments = ["predict", tmp_path / "a.jpg", "--output", tmp_path / "out", "--panoptic", "--size", 32]
    run = CliRunner().invoke(app, [str(a) for a in [*arguments, "--checkpoint", tmp_path / "b.pth"]])
    assert run.exit_code == 1 and "is_thing_map must say which classes are things" in str(run.exception)
    categories = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    (tmp_path / "categories.json").write_text(json.dumps({"categories": categories}))
    arguments += ["--checkpoint", tmp_path / "b.pth", "--categories", tmp_path / "categories.json"]
    run = CliRunner().invoke(app, [str(a) for a in arguments])
    assert run.exit_code == 0, run.output
    written = json.loads((tmp_path / "out" / "panoptic.json").read_text())["categories"]
    assert {"id": 2, "name": "sky", "isthing": 0} in written


def test_segments_are_tinted_outlined_and_named() -> None:
    picture, ids = Image.new("RGB", (90, 60), "white"), np.zeros((60, 90), dtype=np.int64)
    ids[5:55, 5:40], ids[5:55, 40:85] = 7, 300
    drawn = np.asarray(draw_segments(picture, ids, [7, 300], [1, 1], ["cat", "dog"])).astype(int)
    assert drawn[2, 2].tolist() == [255, 255, 255]
    inside = 0.55 * np.array(class_color(1)) + 0.45 * 255
    assert np.abs(drawn[52, 20] - inside).max() <= 1
    assert np.abs(drawn[52, 60] - inside).max() > 20, "the second one of a class has another tint"
    assert drawn[30, 39].tolist() == list(class_color(1))
    assert (drawn[20:40] == [0, 0, 0]).all(-1).any() or (drawn[20:40] == [255, 255, 255]).all(-1).any()
    empty = draw_segments(picture, ids, [], [], [], min_size=200)
    assert empty.size == (270, 180) and np.asarray(empty).min() == 255
    one_pixel = np.zeros((300, 500), dtype=np.int64)
    one_pixel[1, 1] = 5
    draw_segments(Image.new("L", (500, 300)), one_pixel, [5], [2], ["dot"])
    with pytest.raises(ValueError, match=r"ids must be \[60, 90\], .* got \[59, 90\], 1 segments, 1 labels, 1 names"):
        draw_segments(picture, ids[1:], [7], [1], ["cat"])
