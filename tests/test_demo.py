"""The demo's data set, and the demo itself with a handful of updates."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast import demo
from detr_fast.build import model_from_checkpoint
from detr_fast.data import digits
from detr_fast.data.check import check_dataset
from detr_fast.data.coco import CocoDetection
from detr_fast.data.digits import CATEGORIES, DigitScenes, FreshScenes, Scene, run_lengths, write_coco
from detr_fast.data.transforms import eval_transforms
from detr_fast.demo import DemoDisplay, lr_factor, run_demo
from detr_fast.evaluate import CocoEvaluator, evaluate_checkpoint
from detr_fast.fit import Interrupted
from detr_fast.predictor import Predictor

load_digits = pytest.importorskip("sklearn.datasets", reason="the demo's digits are scikit-learn's").load_digits


def scenes(split: str = "val", count: int = 40, **options: int) -> list[Scene]:
    source = DigitScenes(split, count, **options)
    return [source.scene(index) for index in range(count)]


@pytest.mark.parametrize(("split", "size"), [("train", 96), ("val", 96), ("val", 48), ("train", 192)])
def test_boxes_are_tight_around_masks_and_inside_the_picture(split: str, size: int) -> None:
    drawn = scenes(split, size=size)
    assert sum(len(scene.masks) for scene in drawn) > 60
    for scene in drawn:
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        for box, mask in zip(scene.boxes_xyxy_px, scene.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_every_scene_has_digits_that_do_not_cover_each_other() -> None:
    counts = [len(scene.labels) for scene in scenes(count=100, max_digits=5)]
    assert min(counts) >= 1 and max(counts) == 5
    assert max(scene.masks.sum(0).max() for scene in scenes(count=100)) == 1


def test_ink_differs_from_what_is_around_it() -> None:
    differences = []
    for scene in scenes(count=60):
        around = scene.image[~scene.masks.any(0)].mean()
        differences += [abs(scene.image[mask].mean() - around) for mask in scene.masks]
    assert np.median(differences) > 60


def test_labels_are_those_of_the_digits() -> None:
    for scene in scenes(count=20):
        values = load_digits().target[scene.digits]
        assert scene.labels.tolist() == (values + 1).tolist()
        assert [CATEGORIES[label] for label in scene.labels] == [str(value) for value in values]


def test_training_and_validation_share_no_digit() -> None:
    seen = {split: {int(d) for s in scenes(split, 400) for d in s.digits} for split in ("train", "val")}
    assert len(seen["train"]) > 600 and len(seen["val"]) > 300
    assert not seen["train"] & seen["val"]


def test_a_scene_depends_on_split_seed_and_number_alone() -> None:
    first, again = DigitScenes("train", 10, seed=1), DigitScenes("train", 1000, seed=1)
    again.scene(3)
    assert np.array_equal(first.scene(7).image, again.scene(7).image)
    others = [DigitScenes("train", 10, seed=1).scene(8), DigitScenes("train", 10, seed=2).scene(7)]
    others.append(DigitScenes("val", 10, seed=1).scene(7))
    assert not any(np.array_equal(first.scene(7).image, other.image) for other in others)


def test_what_is_written_is_read_as_what_training_gets(tmp_path: Path) -> None:
    files = write_coco(scenes(count=12), tmp_path, "val")
    from_disk = CocoDetection(*files, eval_transforms(96, 96), return_masks=True)
    in_memory = DigitScenes("val", 12, return_masks=True)
    assert from_disk.categories == CATEGORIES and from_disk.num_classes == DigitScenes.num_classes == 11
    for index in range(12):
        (image, target), (expected_image, expected) = from_disk[index], in_memory[index]
        torch.testing.assert_close(image, expected_image, rtol=0, atol=1e-6)
        assert target.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(target[key], value, rtol=0, atol=1e-6)


def test_the_data_set_has_no_problem_and_its_own_boxes_score_1(tmp_path: Path) -> None:
    drawn = scenes(count=30)
    folder, annotations = write_coco(drawn, tmp_path)
    assert check_dataset(folder, annotations, num_queries=15).problems == []
    evaluator = CocoEvaluator(annotations, ("bbox", "segm"))
    for image_id, scene in enumerate(drawn):
        exact = {"scores": torch.ones(len(scene.labels)), "labels": torch.from_numpy(scene.labels)}
        exact |= {"boxes": torch.from_numpy(scene.boxes_xyxy_px), "masks": torch.from_numpy(scene.masks)}
        evaluator.update({image_id: exact})
    assert evaluator.summarize("bbox").stats["AP"] == evaluator.summarize("segm").stats["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("mask", "counts"),
    [([[0, 1], [0, 1]], [2, 2]), ([[1, 0], [0, 0]], [0, 1, 3]), ([[0, 0], [0, 0]], [4]), ([[1, 1], [1, 1]], [0, 4])],
)
def test_run_lengths_go_down_the_columns(mask: list[list[int]], counts: list[int]) -> None:
    assert run_lengths(np.array(mask, dtype=bool)) == {"size": [2, 2], "counts": counts}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be one of .*, got 'test'"),
        ({"size": 8}, "size must be in 48..192 pixels, got 8"),
        ({"length": 0}, "length and max_digits must be at least 1, got 0 and 5"),
        ({"max_digits": 0}, "length and max_digits must be at least 1, got 3 and 0"),
    ],
)
def test_bad_data_options_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitScenes(**{"split": "val", "length": 3} | arguments)


def test_without_scikit_learn_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    digits._digits.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        DigitScenes("val", 3)


def test_an_item_beyond_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError, match=r"index must be in 0..2, got 3"):
        DigitScenes("val", 3)[3]


def test_no_epoch_sees_a_scene_of_another() -> None:
    sampler = FreshScenes(4)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seen += list(sampler)
    assert seen == list(range(12)) and len(sampler) == 4


def test_the_learning_rate_rises_then_falls_to_a_hundredth() -> None:
    factors = [lr_factor(done / 1000) for done in range(1001)]
    peak = factors.index(max(factors))
    assert 0 < factors[0] < 0.05 and 20 < peak < 60 and factors[peak] > 0.99
    assert factors[peak:] == sorted(factors[peak:], reverse=True) and factors[-1] == pytest.approx(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches and few pictures."""
    for name, value in {"BATCH_SIZE": 4, "EPOCH_UPDATES": 3, "TRAIN_IMAGES_ON_DISK": 5, "DRAWN_IMAGES": 7}.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.usefixtures("quick")
def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    result = run_demo(5, output, max_steps=6, val_images=10, device="cpu")
    assert (result.updates, result.images, len(result.history)) == (6, 24, 2)
    assert 0 <= result.stats["AP"] <= result.stats["AP50"] <= 1
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and lines[1]["coco_bbox"] == result.stats
    assert all(line["train_loss"] > 0 and line["val_loss"] > 0 for line in lines)
    printed = capsys.readouterr().out
    assert "AP50" in printed and "10 scenes of unseen digits, after 6 updates" in " ".join(printed.split())
    for name in ("curves.png", "predictions.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 200
    assert len(list((output / "predictions").glob("*.jpg"))) == 7
    assert len(CocoDetection(output / "train" / "images", output / "train" / "instances_train.json")) == 5


@pytest.mark.usefixtures("quick")
def test_demo_with_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_demo(5, tmp_path, max_steps=2, val_images=6, device="cpu", masks=True)
    assert result.mask_stats is not None and result.mask_stats.keys() == result.stats.keys()
    (line,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert line["coco_segm"] == result.mask_stats and line["train_loss_mask"] > 0 and line["train_loss_dice"] > 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "of masks: AP" in printed and "--panoptic" in printed and "--masks" in printed
    assert len(list((tmp_path / "predictions" / "panoptic").glob("*.png"))) == 6
    checkpoint, val = tmp_path / "checkpoint.pth", tmp_path / "val"
    for sharp in (False, True):
        measured = evaluate_checkpoint(
            *(checkpoint, val / "images", val / "instances_val.json"),
            num_workers=0,
            size=demo.SIZE,
            max_size=demo.SIZE,
            masks=True,
            sharp_masks=sharp,
        )
        assert sharp or measured.stats == pytest.approx(result.mask_stats, abs=1e-4)
    predictor = Predictor.from_checkpoint(checkpoint)
    assert predictor.is_thing_map == dict.fromkeys(CATEGORIES, True)
    (found,) = predictor.panoptic(val / "images" / "000000.png", threshold=0.0)
    assert found.ids.shape == (demo.SIZE, demo.SIZE)


@pytest.mark.usefixtures("quick")
def test_the_demo_s_checkpoint_works_with_the_other_commands(tmp_path: Path) -> None:
    result = run_demo(5, tmp_path, max_steps=2, val_images=6, device="cpu")
    checkpoint, val = tmp_path / "checkpoint.pth", tmp_path / "val"
    model, meta = model_from_checkpoint(checkpoint)
    assert meta.categories == CATEGORIES and model.num_queries == demo.MODEL.num_queries
    measured = evaluate_checkpoint(
        checkpoint, val / "images", val / "instances_val.json", num_workers=0, size=demo.SIZE, max_size=demo.SIZE
    )
    assert measured.stats == pytest.approx(result.stats, abs=1e-4)
    found = Predictor.from_checkpoint(checkpoint, threshold=0.0)([val / "images" / "000000.png"])
    assert len(found[0]) == demo.MODEL.num_queries


@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for run, seed in enumerate((0, 0, 1)):
        run_demo(5, tmp_path / str(run), seed, max_steps=2, val_images=2, device="cpu")
        weights.append(torch.load(tmp_path / str(run) / "checkpoint.pth", weights_only=True)["model"])
    name = "transformer.decoder.layers.0.linear1.weight"
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert (weights[0][name] - weights[2][name]).abs().max() > 1e-2


@pytest.mark.usefixtures("quick")
def test_ctrl_c_saves_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DemoDisplay, "move", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run_demo(5, tmp_path, max_steps=300, val_images=4, device="cpu")
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] < 300
    assert (tmp_path / "predictions.png").exists()


@pytest.mark.usefixtures("quick")
def test_time_ends_the_demo(tmp_path: Path) -> None:
    result = run_demo(1e-3, tmp_path, val_images=2, device="cpu")
    assert result.updates == 1 and len(result.history) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"minutes": 0}, "minutes must be positive, got 0"),
        ({"minutes": float("nan")}, "minutes must be positive, got nan"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"val_images": 0}, "val_images must be at least 1, got 0"),
    ],
)
def test_bad_demo_options_are_refused(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_demo(**{"output": tmp_path} | arguments)


def test_another_run_s_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds another run"):
        run_demo(1, tmp_path)
    assert (tmp_path / "checkpoint.pth").read_bytes() == b"precious"
