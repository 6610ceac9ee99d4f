"""Training with masks, from panoptic segments and from COCO's instances: jointly, and on a frozen detector."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import config
from typer.testing import CliRunner

from detr_fast import DetrSegm, Predictor, model_from_checkpoint
from detr_fast.checkpoint import load_checkpoint
from detr_fast.cli import app
from detr_fast.config import ModelConfig, TrainConfig
from detr_fast.plots import draw_log, read_log
from detr_fast.train import train

MODEL = ModelConfig(
    backbone="resnet18", hidden_dim=32, nheads=2, enc_layers=1, dec_layers=2, dim_feedforward=16, num_queries=5
)


def write_panoptic(folder: Path, count: int) -> None:
    """Pictures with a red thing on green stuff, the first of them without any segment."""
    folder.mkdir(parents=True)
    contents: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "red", "isthing": 1}, {"id": 3, "name": "green", "isthing": 0}],
    }
    for number in range(count):
        ids = np.zeros((40, 48), dtype=np.uint8)
        infos = []
        if number > 0:
            ids[:], ids[8:30, 10 : 20 + 3 * number] = 2, 7
            infos = [{"id": 2, "category_id": 3}, {"id": 7, "category_id": 1}]
        Image.fromarray(np.stack((ids, 0 * ids, 0 * ids), -1)).save(folder / f"{number}.png")
        colors = np.stack((np.where(ids == 7, 250, 20), np.where(ids == 2, 250, 20), ids), -1).astype(np.uint8)
        Image.fromarray(colors).save(folder / f"{number}.jpg")
        contents["images"].append({"id": number + 10, "file_name": f"{number}.jpg", "height": 40, "width": 48})
        entry = {"image_id": number + 10, "file_name": f"{number}.png", "segments_info": infos}
        contents["annotations"].append(entry)
    (folder / "panoptic.json").write_text(json.dumps(contents))


def panoptic_config(tmp_path: Path, name: str = "out", **changes) -> TrainConfig:
    for split, count in (("train", 5), ("val", 3)):
        if not (tmp_path / split).exists():
            write_panoptic(tmp_path / split, count)
    settings = {
        "model": replace(MODEL, masks=True),
        "backbone_weights": "none",
        "train_annotations": tmp_path / "train" / "panoptic.json",
        "val_annotations": tmp_path / "val" / "panoptic.json",
        "train_segments": tmp_path / "train",
        "val_segments": tmp_path / "val",
    }
    return replace(config(tmp_path), **{**settings, "output_dir": tmp_path / name, **changes})


def test_panoptic_training_evaluates_quality_and_its_checkpoint_does_too(tmp_path: Path) -> None:
    result = train(panoptic_config(tmp_path))
    lines = [json.loads(line) for line in (result.output / "log.jsonl").read_text().splitlines()]
    assert {"PQ", "SQ", "RQ", "PQ_things", "PQ_stuff"} <= lines[-1]["coco_panoptic"].keys()
    assert {"train_loss_mask", "train_loss_dice", "val_loss_mask"} <= lines[-1].keys()
    assert lines[-1]["train_loss_mask"] > 0
    (axes,) = (a for a in draw_log(read_log(result.output / "log.jsonl")).axes if "panoptic quality" in a.get_title())
    assert len(axes.lines) == 3
    model, meta = model_from_checkpoint(result.output / "checkpoint.pth")
    (prediction,) = Predictor(model, size=48, threshold=0)(tmp_path / "val" / "1.jpg")
    assert len(prediction) == MODEL.num_queries
    assert isinstance(model, DetrSegm) and meta.args["dataset_file"] == "coco_panoptic"
    files = ["--images", tmp_path / "val", "--annotations", tmp_path / "val" / "panoptic.json"]
    arguments = ["eval", "--checkpoint", result.output / "checkpoint.pth", *files, "--segments", tmp_path / "val"]
    run = CliRunner().invoke(app, [str(a) for a in [*arguments, "--num-workers", 0, "--output", tmp_path / "r.json"]])
    assert run.exit_code == 0, run.output
    assert "COCO panoptic, 3 images" in run.output
    assert json.loads((tmp_path / "r.json").read_text())["every"]["pq"] == lines[-1]["coco_panoptic"]["PQ"]

    # A model that finds a class which the annotations do not have: 2, between their 1 and 3.
    checkpoint = load_checkpoint(result.output / "checkpoint.pth")
    checkpoint["model"]["detr.class_embed.bias"][2] += 1e4
    torch.save(checkpoint, tmp_path / "other.pth")
    arguments[2] = tmp_path / "other.pth"
    run = CliRunner().invoke(app, [str(a) for a in [*arguments, "--num-workers", 0, "--output", tmp_path / "o.json"]])
    assert run.exit_code == 0, run.output
    assert "found, but not among the annotations' classes: class 2" in run.output
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["per_class"]["class 2"]["fp"] == found["every"]["fp"] > 0 == found["every"]["pq"]


def test_the_mask_head_alone_on_a_frozen_detector(tmp_path: Path) -> None:
    first = train(panoptic_config(tmp_path, "joint"))
    path = tmp_path / "detector.pth"
    detector = {
        key.removeprefix("detr."): value
        for key, value in load_checkpoint(first.output / "checkpoint.pth")["model"].items()
        if key.startswith("detr.")
    }
    torch.save({"model": detector}, path)
    result = train(panoptic_config(tmp_path, "masks", frozen_weights=path))
    trained = load_checkpoint(result.output / "checkpoint.pth")["model"]
    assert all(torch.equal(trained[f"detr.{key}"], value) for key, value in detector.items())
    before = load_checkpoint(first.output / "checkpoint.pth")["model"]["mask_head.lay3.weight"]
    assert not torch.equal(trained["mask_head.lay3.weight"], before)


def test_instances_train_masks_and_measure_their_ap(tmp_path: Path) -> None:
    settings = config(tmp_path, model=replace(MODEL, masks=True), backbone_weights="none")
    for split in ("train", "val"):
        path = tmp_path / split / "instances.json"
        contents = json.loads(path.read_text())
        for entry in contents["annotations"]:
            x, y, w, h = entry["bbox"]
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        path.write_text(json.dumps(contents))
    result = train(settings)
    line = json.loads((result.output / "log.jsonl").read_text().splitlines()[-1])
    assert len(line["coco_segm"]) == 12 and line["train_loss_dice"] > 0


def test_options_that_need_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen_weights must be used with masks"):
        panoptic_config(
            tmp_path, model=MODEL, frozen_weights=tmp_path / "x.pth", train_segments=None, val_segments=None
        )
    with pytest.raises(ValueError, match="train_segments must be used with masks"):
        panoptic_config(tmp_path, model=MODEL)
    with pytest.raises(ValueError, match="val_segments must be as train_segments"):
        panoptic_config(tmp_path, val_segments=None)
