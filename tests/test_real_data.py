"""Real images end to end, on one process and on two: train, evaluate, predict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from training_data import config

from detr_fast.checkpoint import load_checkpoint
from detr_fast.config import OptimConfig
from detr_fast.evaluate import evaluate_checkpoint
from detr_fast.predict import predict_files
from detr_fast.predictor import Predictor
from detr_fast.train import train

SCALES, MAX_SIZE = (64, 96), 128
SMALL = {
    "backbone": "tiny",
    "hidden-dim": 16,
    "nheads": 2,
    "enc-layers": 1,
    "dec-layers": 2,
    "dim-feedforward": 16,
    "num-queries": 20,
    "scales": "64,96",
    "max-size": MAX_SIZE,
    "batch-size": 2,
    "num-workers": 0,
    "device": "cpu",
}


@dataclass(frozen=True)
class Data:
    """A few images of a data set to train on, and a few to measure on."""

    train_images: Path
    train_annotations: Path
    val_images: Path
    val_annotations: Path
    num_categories: int


@pytest.fixture(params=["coco200", "bccd"])
def data(request: pytest.FixtureRequest, shared_data: Path, tmp_path: Path) -> Data:
    if request.param == "coco200":
        root = shared_data / "coco200"
        images = {split: root / "images" / f"{split}2017" for split in ("train", "val")}
        annotations = {s: root / "annotations" / f"instances_{s}2017.json" for s in ("train", "val")}
    else:
        folder, annotation_file = request.getfixturevalue("bccd")
        images, annotations = dict.fromkeys(("train", "val"), folder), dict.fromkeys(("train", "val"), annotation_file)
    return Data(
        images["train"],
        some_of(annotations["train"], slice(9), tmp_path / "train.json"),
        images["val"],
        some_of(annotations["val"], slice(20, 25), tmp_path / "val.json"),
        num_categories=80 if request.param == "coco200" else 3,
    )


def some_of(annotations: Path, chosen: slice, target: Path) -> Path:
    contents = json.loads(annotations.read_text())
    contents["images"] = contents["images"][chosen]
    ids = {image["id"] for image in contents["images"]}
    contents["annotations"] = [entry for entry in contents["annotations"] if entry["image_id"] in ids]
    target.write_text(json.dumps(contents))
    return target


def check_predictions(checkpoint: Path, data: Data, output: Path) -> None:
    names = {image["file_name"] for image in json.loads(data.val_annotations.read_text())["images"]}
    predictor = Predictor.from_checkpoint(checkpoint, threshold=0.0, batch_size=2)
    summary = predict_files(
        [data.val_images / name for name in names], predictor, output, annotations=data.val_annotations
    )
    assert summary.ok and not summary.unannotated
    assert len(summary.images) == 5 and len(summary.predictions) > 0
    assert len(list(output.glob("*.jpg"))) == 5


@pytest.mark.parametrize("amp", [False, True])
def test_one_process(data: Data, amp: bool, tmp_path: Path) -> None:
    paths = {name: value for name, value in vars(data).items() if name != "num_categories"}
    optim = {"epochs": 1, "amp": amp, "lr": OptimConfig().lr}
    result = train(config(tmp_path, optim=optim, scales=SCALES, max_size=MAX_SIZE, **paths))
    assert result.state.step == 4
    checkpoint = result.output / "checkpoint.pth"
    assert len(load_checkpoint(checkpoint)["categories"]) == data.num_categories
    sizes = {"size": max(SCALES), "max_size": MAX_SIZE}
    measured = evaluate_checkpoint(checkpoint, data.val_images, data.val_annotations, num_workers=0, **sizes)
    if not amp:
        assert measured.stats == pytest.approx(result.stats, nan_ok=True)
    check_predictions(checkpoint, data, tmp_path / "predictions")


def test_two_processes(data: Data, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "detr_fast", "train", "--output", str(tmp_path / "out"), "--epochs", "2"]
    command += [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    for split in ("train", "val"):
        command += [f"--{split}-images", str(getattr(data, f"{split}_images"))]
        command += [f"--{split}-annotations", str(getattr(data, f"{split}_annotations"))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("epoch 1/2") == 1  # the other process is silent

    checkpoint = tmp_path / "out" / "checkpoint.pth"
    contents = load_checkpoint(checkpoint)
    assert len(contents["random_state"]) == 2
    assert contents["step"] == 2 * 2  # 9 images, 10 with the sampler's repetition: 5 a process, 2 whole batches
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    # What two processes measured, one measures again.
    sizes = {"size": max(SCALES), "max_size": MAX_SIZE}
    measured = evaluate_checkpoint(checkpoint, data.val_images, data.val_annotations, num_workers=0, **sizes)
    assert measured.stats == pytest.approx(lines[1]["coco_bbox"], abs=1e-6, nan_ok=True)
    check_predictions(checkpoint, data, tmp_path / "predictions")
