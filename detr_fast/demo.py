"""The demo: a small Detr learns to find handwritten digits on photographs, from scratch, within minutes on a CPU.

It is the plain DETR of this library: `Detr`, `HungarianMatcher`, `SetCriterion`. It is known to converge
slowly; what makes it quick here is stated at the settings below.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from detr_fast.build import criterion_from_args, model_from_args
from detr_fast.checkpoint import prepare_output_folder, save_checkpoint
from detr_fast.config import LossConfig, ModelConfig, OptimConfig
from detr_fast.data.batch import collate
from detr_fast.data.coco import CocoDetection
from detr_fast.data.digits import CATEGORIES, DigitScenes, FreshScenes, write_coco
from detr_fast.data.images import load_image
from detr_fast.data.transforms import eval_transforms
from detr_fast.drawing import contact_sheet
from detr_fast.evaluate import CocoEvaluator, evaluate
from detr_fast.fit import EpochReport, FitHooks, Interrupted, StepReport, fit
from detr_fast.interrupt import StopSignals
from detr_fast.models.segmentation import DetrSegm
from detr_fast.panoptic_prediction import PanopticPrediction
from detr_fast.plots import plot_log
from detr_fast.postprocess import PostProcess
from detr_fast.predict import predict_files
from detr_fast.predictor import Prediction, Predictor
from detr_fast.progress import DemoDisplay
from detr_fast.train import CHECKPOINT, LOG, append_line, choose_device
from detr_fast.train_state import TrainState

SIZE = 96
THINGS = dict.fromkeys(CATEGORIES, True)
MODEL = ModelConfig(
    backbone="tiny",
    hidden_dim=128,
    enc_layers=2,
    dec_layers=3,
    dim_feedforward=256,
    dropout=0.0,
    pre_norm=True,
    num_queries=15,
)
# Ten times less weight on boxes, as against classes, than in the paper: finding ink is learnt within a minute, reading
# it is what takes long. AP50 after 24,000 scenes, the learning rate held: 0.22; with the paper's weights 0.02, with
# post-norm 0.07, with twice the learning rate 0.09.
LOSS = LossConfig(set_cost_class=1.0, set_cost_bbox=2.5, set_cost_giou=1.0, bbox_loss_coef=0.5, giou_loss_coef=0.2)
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
WARM_UP = 0.03  # of the whole time
# All masks of a batch at once: they are small, and to compute them again in the backward pass would take half as long
# as the detector's update.
MASK_CHUNK = 512
# About a minute on two cores.
EPOCH_UPDATES = 250

TRAIN_IMAGES_ON_DISK = 400
VAL_IMAGES = 200
DRAWN_IMAGES = 24
SHEET_COLUMNS = 6
TILE_PX = 288
# Drawing at the end takes four seconds on two cores; the rest is for slower machines.
DRAWING_SECONDS = 10.0
# Above this, threads cost such a small model more time than they save.
MOST_THREADS = 16


@dataclass(frozen=True)
class DemoResult:
    """What the demo came to.

    Attributes:
        output: the folder with everything.
        stats: the twelve COCO numbers on the validation scenes, of the weights in ``checkpoint.pth``.
        updates, images: how much was trained.
        seconds: how long all of it took.
        history: (seconds since the start, AP, AP50) of every evaluation.
        mask_stats: as ``stats``, of the masks, where they were trained.
    """

    output: Path
    stats: dict[str, float]
    updates: int
    images: int
    seconds: float
    history: list[tuple[float, float, float]] = field(default_factory=list)
    mask_stats: dict[str, float] | None = None


def run_demo(
    minutes: float = 10.0,
    output: str | os.PathLike[str] = "demo",
    seed: int = 0,
    *,
    device: str = "auto",
    max_steps: int | None = None,
    val_images: int = VAL_IMAGES,
    masks: bool = False,
) -> DemoResult:
    """Make the data, train, evaluate about every minute, and draw.

    ``output`` gets ``train/`` and ``val/`` (COCO-format data sets with boxes and masks; training goes on beyond the
    scenes on the disk, with the same digits), ``checkpoint.pth``, ``log.jsonl``, ``curves.png``,
    ``predictions.png`` (many small pictures) and ``predictions/``. Files of an earlier demo are replaced. Ctrl-C ends
    the training early: the checkpoint is saved, and what was learnt until then is drawn.

    Args:
        minutes: wall-clock time for all of it. The learning rate falls over this time, so a run of another
            length is another run.
        output: made where it is missing.
        seed: of the weights and the scenes.
        device: "cuda", "cpu", "mps", or "auto": cuda where there is a GPU.
        max_steps: train for so many updates (rounded up to epochs of equal length), in place of a time; then a seed
            always gives the same weights on the same machine.
        val_images: validation scenes.
        masks: train a mask head too, and draw segments in place of boxes.

    Raises:
        ValueError: a number is not positive, or ``output`` holds another run.
        CheckpointError: ``output`` cannot be written.
        ModuleNotFoundError: scikit-learn, which has the digits and photographs, is not installed.
        Interrupted: Ctrl-C ended it; everything is written.
    """
    started = time.monotonic()
    _check(minutes, max_steps, val_images)
    folder = _prepare(Path(output))
    with _all_cores(), DemoDisplay(60 * minutes) as display:
        demo = _Demo(folder, seed, torch.device(choose_device(device)), started, display, masks)
        demo.make_data(val_images)
        try:
            demo.train(60 * minutes, max_steps)
        except Interrupted:
            demo.draw()
            raise
        demo.draw()
    return demo.result()


def lr_factor(done: float) -> float:
    """Warm-up, then half a cosine down to a hundredth; ``done`` is the part of the training that is over."""
    return min(1.0, 0.02 + done / WARM_UP) * (0.505 + 0.495 * math.cos(math.pi * done))


class _Demo:
    """One run: the steps of ``run_demo`` and what they share."""

    def __init__(
        self, folder: Path, seed: int, device: torch.device, started: float, display: DemoDisplay, masks: bool
    ) -> None:
        self.folder, self.seed, self.device = folder, seed, device
        self.started, self.display, self.masks = started, display, masks
        self.mask_stats: dict[str, float] | None = None
        self.stats: dict[str, float] = {}
        self.evaluated_step = 0
        self.history: list[tuple[float, float, float]] = []
        self.signals = StopSignals()
        torch.manual_seed(seed)
        optim = OptimConfig(lr=LEARNING_RATE, lr_backbone=LEARNING_RATE)
        self.args = _args(optim, seed, masks)
        model = model_from_args(SimpleNamespace(**self.args)).to(device)
        if isinstance(model, DetrSegm):
            model.chunk = MASK_CHUNK
        self.state = TrainState.start(model, optim)
        self.criterion = criterion_from_args(SimpleNamespace(**self.args)).to(device)

    def make_data(self, val_images: int) -> None:
        """Write both data sets."""
        for split, count in (("train", TRAIN_IMAGES_ON_DISK), ("val", val_images)):
            scenes = DigitScenes(split, count, size=SIZE, seed=self.seed)
            write_coco([scenes.scene(index) for index in range(count)], self.folder / split, split)
        dataset = CocoDetection(*self.val_files, eval_transforms(SIZE, SIZE), return_masks=self.masks)
        # Decoded once: reading the files for every evaluation would take as long as the model does.
        self.val_batches = list(DataLoader(dataset, BATCH_SIZE, collate_fn=collate))

    @property
    def val_files(self) -> tuple[Path, Path]:
        """The validation images' folder and their annotations."""
        return self.folder / "val" / "images", self.folder / "val" / "instances_val.json"

    def train(self, seconds: float, max_steps: int | None) -> None:
        """Train for ``max_steps`` updates, or until the time is over but for the drawing."""
        epochs = 10**6 if max_steps is None else math.ceil(max_steps / EPOCH_UPDATES)
        updates = EPOCH_UPDATES if max_steps is None else math.ceil(max_steps / epochs)
        left = seconds - self._seconds() - min(DRAWING_SECONDS, seconds / 10)
        hooks = FitHooks(
            on_step=self._on_step,
            should_stop=self.signals,
            lr_factor=lr_factor,
            max_seconds=max(left, 1e-3) if max_steps is None else None,
            log_every=5,
        )
        options = OptimConfig(epochs=epochs, lr=LEARNING_RATE, lr_backbone=LEARNING_RATE)
        model, loader = self.state.model, _train_loader(updates, epochs, self.seed, self.masks)
        self.display.note(
            self._introduction(f"{seconds / 60:g} minutes" if max_steps is None else f"{max_steps} updates")
        )
        with self.signals:
            try:
                fit(model, self.criterion, loader, options, state=self.state, on_epoch=self._on_epoch, hooks=hooks)
            except Interrupted:
                self._save()
                self.display.note("stopped: drawing what was learnt so far")
                raise

    def draw(self) -> None:
        """Write the curves and the pictures, and say where they are."""
        images = sorted(self.val_files[0].iterdir())[:DRAWN_IMAGES]
        settings: dict[str, Any] = {"size": SIZE, "max_size": SIZE, "batch_size": BATCH_SIZE, "is_thing_map": THINGS}
        predictor = Predictor(self.state.model, CATEGORIES, device=self.device, **settings)
        threshold = predictor.threshold if self.masks else None
        folder, annotations = self.folder / "predictions", self.val_files[1]
        predict_files(images, predictor, folder, annotations=annotations, panoptic=threshold)
        if threshold is None:
            drawn = _drawn(images, predictor(images))
        else:
            drawn = _drawn(images, predictor.panoptic(images, threshold=threshold))
        contact_sheet(drawn, SHEET_COLUMNS).save(self.folder / "predictions.png")
        if self.history:
            plot_log(self.folder)
        self.display.note(self._conclusion())

    def result(self) -> DemoResult:
        """What it came to."""
        steps = self.state.step
        return DemoResult(
            self.folder, self.stats, steps, steps * BATCH_SIZE, self._seconds(), self.history, self.mask_stats
        )

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _on_step(self, report: StepReport) -> None:
        rate = report.images / max(report.seconds, 1e-9)
        score = f"  AP50 {self.stats['AP50']:.2f}" if self.stats else ""
        self.display.move(self._seconds(), f"loss {report.loss:.3f}  {rate:.0f} img/s{score}")

    def _on_epoch(self, state: TrainState, report: EpochReport) -> None:
        # Saved before the evaluation, so that stopping in the middle of that loses nothing.
        self._save()
        evaluator = CocoEvaluator(self.val_files[1], ("bbox", "segm") if self.masks else ("bbox",))
        with self.signals.at_once():
            result, losses = evaluate(
                state.model,
                self.val_batches,
                postprocess=PostProcess(),
                evaluator=evaluator,
                device=self.device,
                criterion=self.criterion,
            )
        self.stats, self.evaluated_step = dict(result.stats), state.step
        self.mask_stats = dict(evaluator.summarize("segm").stats) if self.masks else None
        self.history.append((self._seconds(), self.stats["AP"], self.stats["AP50"]))
        self._log(report, losses)
        self.display.note(
            f"{self._seconds() / 60:5.1f} min  {state.step:5d} updates  loss {report.losses['loss']:6.3f}  "
            f"{self._scores()}"
        )

    def _scores(self) -> str:
        scores = f"AP {self.stats['AP']:.3f}  AP50 {self.stats['AP50']:.3f}"
        if self.mask_stats is None:
            return scores
        return f"{scores}  of masks: AP {self.mask_stats['AP']:.3f}  AP50 {self.mask_stats['AP50']:.3f}"

    def _log(self, report: EpochReport, val_losses: dict[str, float]) -> None:
        weights: dict[str, float] = self.criterion.weight_dict
        line = {
            "epoch": report.epoch,
            **{f"train_{name}": value for name, value in report.losses.items()},
            **{f"val_{name}": value * weights.get(name, 1.0) for name, value in val_losses.items()},
            "lr": report.lr,
            "coco_bbox": self.stats,
            **({} if self.mask_stats is None else {"coco_segm": self.mask_stats}),
            "seconds": round(report.seconds, 3),
            "images_per_second": round(report.images / max(report.seconds, 1e-9), 3),
            "seconds_since_start": round(self._seconds(), 3),
        }
        append_line(self.folder / LOG, json.dumps(line))

    def _save(self) -> None:
        contents = {"model": self.state.model.state_dict(), "epoch": self.state.epoch, "step": self.state.step}
        contents |= {"args": self.args, "categories": CATEGORIES, "is_thing_map": THINGS}
        save_checkpoint(contents, self.folder / CHECKPOINT)

    def _introduction(self, length: str) -> str:
        parameters = sum(parameter.numel() for parameter in self.state.model.parameters())
        return (
            f"training a Detr of {parameters / 1e6:.1f} million parameters from scratch for {length} "
            f"on {self.device} ({torch.get_num_threads()} threads)"
        )

    def _conclusion(self) -> str:
        images, annotations = self.val_files
        score = f"stopped after {self.state.step} updates, before the first evaluation"
        if self.stats:
            count = sum(len(targets) for _, targets in self.val_batches)
            score = f"{self._scores()} on {count} scenes of unseen digits, after {self.evaluated_step} updates"
        return (
            f"{score}\n"
            f"pictures: {self.folder / 'predictions.png'} and {self.folder / 'predictions'}\n"
            f"go on with: detr-fast predict {images} --checkpoint {self.folder / CHECKPOINT}"
            f"{' --panoptic' if self.masks else ''}\n"
            f"            detr-fast eval --checkpoint {self.folder / CHECKPOINT} --images {images} "
            f"--annotations {annotations}{' --masks' if self.masks else ''}"
        )


def _check(minutes: float, max_steps: int | None, val_images: int) -> None:
    if not minutes > 0 or not math.isfinite(minutes):
        raise ValueError(f"minutes must be positive, got {minutes}")
    for name, value in (("max_steps", max_steps), ("val_images", val_images)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _prepare(folder: Path) -> Path:
    """Make the folder, and take away the log of an earlier demo."""
    ours = (folder / "val" / "instances_val.json").exists()
    if not ours and any((folder / name).exists() for name in (CHECKPOINT, LOG)):
        raise ValueError(f"output must be a new folder or an earlier demo's, {folder} holds another run")
    prepare_output_folder(folder)
    (folder / LOG).unlink(missing_ok=True)
    return folder


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let torch use every core but those that draw scenes, unless OMP_NUM_THREADS says how many.

    One thread too many is costly: torch's threads wait for each other many times an update, and one that has lost its
    core to another process stops them all. On two busy cores, two threads did a twelfth of the updates of one.
    """
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(_cores() - _workers(), MOST_THREADS)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _workers() -> int:
    # Drawing the scenes takes a fifth of the time that one thread trains on them, so a few processes keep up.
    return 0 if _cores() == 1 else min(4, 1 + _cores() // 8)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _args(optim: OptimConfig, seed: int, masks: bool) -> dict[str, Any]:
    """What the checkpoint tells its readers, under the original's option names."""
    data = {"dataset_file": "digits", "num_classes": max(CATEGORIES) + 1, "scales": [SIZE], "max_size": SIZE}
    run = {"batch_size": BATCH_SIZE, "seed": seed, "masks": masks}
    return {**asdict(MODEL), **asdict(LOSS), **asdict(optim), **data, **run}


def _train_loader(updates: int, epochs: int, seed: int, masks: bool) -> DataLoader[Any]:
    length = updates * BATCH_SIZE
    workers = _workers()
    return DataLoader(
        DigitScenes("train", length * epochs, size=SIZE, seed=seed, return_masks=masks),
        BATCH_SIZE,
        sampler=FreshScenes(length),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
    )


def _ignore_interrupts(worker_id: int) -> None:
    # Ctrl-C goes to every process of the terminal; the main one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _drawn(images: list[Path], found: Sequence[Prediction | PanopticPrediction]) -> list[Image.Image]:
    return [x.draw(load_image(path), min_size=TILE_PX) for path, x in zip(images, found, strict=True)]
