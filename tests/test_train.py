"""Whole training runs: what they write, how they resume, how they end."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from training_data import NAMES, SMALL_MODEL, config, write_coco

from detr_fast import train as train_module
from detr_fast.build import model_from_checkpoint
from detr_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from detr_fast.data.annotations import AnnotationError
from detr_fast.finite import NonFiniteLossError
from detr_fast.fit import EpochReport, Interrupted, StepReport
from detr_fast.progress import TrainProgress
from detr_fast.train import TrainResult, append_line, train


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def give_scores(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    left = iter(scores)
    monkeypatch.setattr(
        train_module, "evaluate", lambda *_, **__: (SimpleNamespace(stats={"AP": next(left)}), {"loss": 1.0})
    )


def test_what_a_run_writes(tmp_path: Path) -> None:
    result = train(config(tmp_path, optim={"ema_decay": 0.9}))
    assert sorted(os.listdir(result.output)) == ["checkpoint.pth", "checkpoint_best.pth", "log.jsonl"]
    lines = log_lines(result.output)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert {"train_loss", "train_loss_ce", "val_loss", "lr", "coco_bbox", "seconds"} <= lines[0].keys()
    assert len(lines[0]["coco_bbox"]) == 12
    terms = [lines[0][f"train_loss_{name}{layer}"] for name in ("ce", "bbox", "giou") for layer in ("", "_0")]
    assert sum(terms) == pytest.approx(lines[0]["train_loss"], rel=1e-4)
    terms = [lines[0][f"val_loss_{name}{layer}"] for name in ("ce", "bbox", "giou") for layer in ("", "_0")]
    assert sum(terms) == pytest.approx(lines[0]["val_loss"], rel=1e-4)

    checkpoint = load_checkpoint(result.output / "checkpoint.pth")
    assert {"model", "optimizer", "lr_scheduler", "epoch", "args"} <= checkpoint.keys()
    assert checkpoint["epoch"] == 1
    assert checkpoint["step"] == 2 * 3
    assert checkpoint["categories"] == NAMES
    assert checkpoint["args"]["hidden_dim"] == SMALL_MODEL.hidden_dim
    assert checkpoint["args"]["num_classes"] == 4

    model, meta = model_from_checkpoint(result.output / "checkpoint.pth")
    assert meta.categories == NAMES
    assert same(model.state_dict(), checkpoint["ema"])
    assert not same(dict(checkpoint["model"]), dict(checkpoint["ema"]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resuming_is_as_if_never_stopped(tmp_path: Path, num_workers: int) -> None:
    def run(name: str, epochs: int, **changes: Any) -> TrainResult:
        optim = {"epochs": epochs, "ema_decay": 0.9, "lr_drop": 3, "accumulate": 2}
        return train(config(tmp_path, optim=optim, output_dir=tmp_path / name, num_workers=num_workers, **changes))

    straight = run("straight", 4)
    run("stopped", 2)
    torch.manual_seed(1234)  # whatever came between
    resumed = run("stopped", 4, resume=True)

    one, other = (load_checkpoint(result.output / "checkpoint.pth") for result in (straight, resumed))
    for entry in one.keys() - {"args"}:
        assert same(one[entry], other[entry]), entry
    assert one["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-4)
    timed = ("seconds", "images_per_second", "memory_bytes")
    logs = [
        [{k: v for k, v in line.items() if k not in timed} for line in log_lines(result.output)]
        for result in (straight, resumed)
    ]
    assert logs[0] == logs[1]
    # Dropout and augmentation did draw, and the weights did move.
    assert logs[0][0]["train_loss"] != logs[0][1]["train_loss"]
    assert not same(one["model"], load_checkpoint(straight.output / "checkpoint_best.pth")["model"]) or one["best"] == 0


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert train(config(tmp_path, optim={"epochs": 1}, resume=True)).state.epoch == 0


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    train(config(tmp_path, optim={"epochs": 1}))
    before = (tmp_path / "out" / "checkpoint.pth").read_bytes()
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth exists: continue that run with --resume"):
        train(config(tmp_path, optim={"epochs": 1}))
    assert (tmp_path / "out" / "checkpoint.pth").read_bytes() == before
    assert train(config(tmp_path, optim={"epochs": 1}, resume=True)).state.step == 3  # nothing left to do


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    train(config(tmp_path, optim={"epochs": 1}))
    with pytest.raises(CheckpointError, match=r"as it was: lr was 0\.001, now it is 0\.5"):
        train(config(tmp_path, optim={"lr": 0.5}, resume=True))
    with pytest.raises(CheckpointError, match="as it was: hidden_dim was 16, now it is 32"):
        train(config(tmp_path, model=replace(SMALL_MODEL, hidden_dim=32), resume=True))
    images, annotations = write_coco(tmp_path / "other", 6, {1: "blue", 3: "green"})
    other = {"train_images": images, "train_annotations": annotations}
    other |= {"val_images": images, "val_annotations": annotations}
    with pytest.raises(CheckpointError, match="the categories of the training data have changed"):
        train(config(tmp_path, resume=True, **other))
    checkpoint = load_checkpoint(tmp_path / "out" / "checkpoint.pth")
    save_checkpoint({"model": checkpoint["model"]}, tmp_path / "out" / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="has no epoch, lr_scheduler, optimizer, random_state, step"):
        train(config(tmp_path, resume=True))


def test_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="output folder .*file/out cannot be written"):
        train(config(tmp_path, output_dir=tmp_path / "file" / "out"))


def test_data_that_does_not_fit(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path / "other", 4, {1: "red", 3: "blue"})
    with pytest.raises(AnnotationError, match="category 3 is 'blue', in .* it is 'green'"):
        train(config(tmp_path, val_images=images, val_annotations=annotations))
    images, annotations = write_coco(tmp_path / "more", 4, {1: "red", 7: "blue"})
    with pytest.raises(AnnotationError, match="category 7 is 'blue', in .* it is 'absent'"):
        train(config(tmp_path, val_images=images, val_annotations=annotations))
    with pytest.raises(AnnotationError, match="has 6 images, batch size times processes is 7"):
        train(config(tmp_path, batch_size=7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"scales": ()}, r"scales must be one or more positive sizes, got \(\)"),
        ({"reset_class_head": True}, "reset_class_head must be used with pretrained"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
    ],
)
def test_bad_options(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device must be one that is here, got 'cuda'"):
        train(config(tmp_path, device="cuda"))


def test_starting_from_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path, optim={"epochs": 1}))
    trained = load_checkpoint(tmp_path / "out" / "checkpoint.pth")["model"]
    still = {"epochs": 1, "lr": 0.0, "lr_backbone": 0.0}
    pretrained = {"pretrained": tmp_path / "out" / "checkpoint.pth", "output_dir": tmp_path / "second"}
    images, annotations = write_coco(tmp_path / "other", 6, {5: "blue"})
    other = {"train_images": images, "train_annotations": annotations}
    other |= {"val_images": images, "val_annotations": annotations}
    with pytest.raises(CheckpointError, match=r"class_embed\.weight: .*\[7, 16\], .*\[5, 16\]; --reset-class-head"):
        train(config(tmp_path, optim=still, **pretrained, **other))

    capsys.readouterr()
    state = train(config(tmp_path, optim=still, reset_class_head=True, **pretrained, **other)).state
    assert "started anew: class_embed.weight, class_embed.bias" in capsys.readouterr().out
    assert torch.equal(state.model.state_dict()["query_embed.weight"], trained["query_embed.weight"])
    assert state.model.state_dict()["class_embed.bias"].shape == (7,)


def test_a_download_that_fails_stops_the_run_and_says_what_else_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    resnet = replace(SMALL_MODEL, backbone="resnet18")
    with pytest.raises(CheckpointError, match="no route to host; --backbone-weights takes a file of them, or none"):
        train(config(tmp_path, model=resnet))
    assert not (tmp_path / "out" / "checkpoint.pth").exists()
    assert train(config(tmp_path, model=resnet, backbone_weights="none", optim={"epochs": 1})).state.step > 0


def test_best_checkpoint_and_regular_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_scores(monkeypatch, [0.1, 0.3, 0.2, 0.3])
    result = train(config(tmp_path, optim={"epochs": 4}, save_every=2))
    assert result.best == 0.3
    best = load_checkpoint(tmp_path / "out" / "checkpoint_best.pth")
    assert (best["epoch"], best["best"]) == (1, 0.3)
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pth")["best"] == 0.3
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint0*.pth"))
    assert kept == ["checkpoint0001.pth", "checkpoint0003.pth"]
    give_scores(monkeypatch, [0.25])
    assert train(config(tmp_path, optim={"epochs": 5}, save_every=2, resume=True)).best == 0.3
    assert load_checkpoint(tmp_path / "out" / "checkpoint_best.pth")["epoch"] == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_epoch_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    def strike(self: TrainProgress, report: StepReport) -> None:
        if (report.epoch, report.step) == (1, 2):
            os.kill(os.getpid(), signum)

    handler = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(TrainProgress, "step", strike)
        with pytest.raises(Interrupted) as stop:
            train(config(tmp_path, optim={"epochs": 3}))
    assert stop.value.signum == signum
    assert signal.getsignal(signum) is handler
    saved = load_checkpoint(tmp_path / "out" / "checkpoint.pth")
    assert (saved["epoch"], saved["step"]) == (0, 5)
    resumed = train(config(tmp_path, optim={"epochs": 3}, resume=True)).state
    assert (resumed.epoch, resumed.step) == (2, 5 + 2 * 3)
    assert [line["epoch"] for line in log_lines(tmp_path / "out")] == [0, 1, 2]


def test_a_signal_in_the_evaluation_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def strike(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation went on")

    monkeypatch.setattr(train_module, "evaluate", strike)
    with pytest.raises(Interrupted) as stop:
        train(config(tmp_path))
    assert stop.value.at_once
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pth")["epoch"] == 0


def test_a_second_signal_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def strike(self: TrainProgress, report: StepReport) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainProgress, "step", strike)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path))


def test_a_loss_that_is_not_finite_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detr_fast.criterion import SetCriterion

    clean = SetCriterion.forward

    def poisoned(self: SetCriterion, *arguments: Any) -> dict[str, torch.Tensor]:
        losses = clean(self, *arguments)
        return {name: loss * (float("nan") if "giou" in name else 1) for name, loss in losses.items()}

    monkeypatch.setattr(SetCriterion, "forward", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"loss_giou, loss_giou_0 not finite .*nan_state\.pth") as error:
        train(config(tmp_path))
    saved = load_checkpoint(tmp_path / "out" / "nan_state.pth")
    assert saved["image_ids"] == error.value.image_ids
    assert set(saved["image_ids"]) <= set(range(10, 16)) and len(saved["image_ids"]) == 2
    assert {"boxes", "labels", "image_id"} <= saved["targets"][0].keys()
    assert {"model", "optimizer", "args", "random_state"} <= saved.keys()
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def test_full_disk_while_training_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(tmp_path, optim={"epochs": 1}))
    before = (tmp_path / "out" / "checkpoint.pth").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(config(tmp_path, resume=True))
    assert (tmp_path / "out" / "checkpoint.pth").read_bytes() == before


def test_a_log_with_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for text in ("a", "b"):
        append_line(path, text)
    path.write_text("a\nb\n{half")
    append_line(path, "c")
    assert path.read_text() == "a\nb\n{half\nc\n"


# ---- on a terminal and elsewhere

STEP = StepReport(epoch=2, step=3, steps=12, loss=1.25, images=60, seconds=2.0, lr=1e-4)
EPOCH = EpochReport(epoch=2, losses={"loss": 1.5}, lr=1e-4, images=240, seconds=8.0)


def test_progress_on_a_terminal() -> None:
    screen = io.StringIO()
    with TrainProgress(300, Console(file=screen, force_terminal=True, width=120)) as progress:
        progress.step(STEP)
        progress.bar.refresh()
        progress.epoch(EPOCH, {"AP": 0.25, "AP50": 0.5})
    shown = screen.getvalue()
    for part in ("epoch 3/300", "27/3600", "loss 1.250", "30.0 img/s", "GiB", "loss 1.500  AP 0.250  AP50 0.500"):
        assert part in shown


def test_progress_elsewhere_is_a_line_an_epoch() -> None:
    screen = io.StringIO()
    with TrainProgress(300, Console(file=screen, width=60)) as progress:
        progress.step(STEP)
        progress.epoch(EPOCH, {})
    assert screen.getvalue().splitlines() == [screen.getvalue().strip()]
    assert screen.getvalue().startswith("epoch 3/300  loss 1.500  30.0 img/s")
