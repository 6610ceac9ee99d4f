"""Training on data in COCO format, from a configuration to a folder of checkpoints and a log.

The output folder holds ``checkpoint.pth`` (after the last epoch), ``checkpoint_best.pth`` (highest AP), ``log.jsonl``
(a line an epoch), and ``nan_state.pth`` where a loss was not finite.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from detr_fast.build import IMAGENET_URLS, criterion_from_args, load_backbone_weights, model_from_args
from detr_fast.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    prepare_output_folder,
    random_state,
    save_checkpoint,
    set_random_state,
)
from detr_fast.config import PAPER_SCALES, TrainConfig
from detr_fast.data.annotations import AnnotationError
from detr_fast.data.batch import collate
from detr_fast.data.coco import CocoDetection, seed_worker
from detr_fast.data.coco_panoptic import CocoPanoptic, open_dataset
from detr_fast.data.transforms import eval_transforms, train_transforms
from detr_fast.distributed import barrier, init_from_env, is_main, rank, world_size
from detr_fast.evaluate import CocoEvaluator, evaluate
from detr_fast.finite import NonFiniteLossError
from detr_fast.fit import EpochReport, FitHooks, Interrupted, fit
from detr_fast.interrupt import StopSignals
from detr_fast.panoptic_evaluator import PanopticEvaluator
from detr_fast.postprocess import PostProcess
from detr_fast.postprocess_masks import PostProcessPanoptic, things_of_every_class
from detr_fast.progress import TrainProgress, peak_memory
from detr_fast.train_state import TrainState

__all__ = ["FitHooks", "Interrupted", "NonFiniteLossError", "TrainResult", "TrainState", "fit", "train"]

CHECKPOINT, BEST, LOG, NAN_STATE = "checkpoint.pth", "checkpoint_best.pth", "log.jsonl", "nan_state.pth"

# What a resumed run may be told anew: where things are, how long it goes on, how the work is spread.
MAY_CHANGE = {
    *("train_images", "train_annotations", "val_images", "val_annotations", "output_dir", "device"),
    *("train_segments", "val_segments", "frozen_weights"),
    *("epochs", "num_workers", "resume", "pretrained", "reset_class_head", "backbone_weights"),
    *("compile", "cuda_graph", "activation_checkpointing"),
    *("save_every", "log_every"),
}


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        state: the state after the last epoch.
        best: the highest AP, None where no epoch was run.
        stats: the last epoch's twelve COCO numbers.
        output: the folder.
    """

    state: TrainState
    best: float | None
    stats: dict[str, float]
    output: Path


def train(config: TrainConfig) -> TrainResult:
    """Train a Detr, evaluating after every epoch; under ``torchrun``, data-parallel.

    SIGINT (Ctrl-C) and SIGTERM end it after the update in progress, with a checkpoint that holds it; resuming then
    begins that epoch anew. Resuming after a finished epoch gives the weights that the uninterrupted run gives, if
    ``num_workers`` and the number of processes are the same; with ``cuda_graph`` up to roundings and dropout, because
    which batches a graph computes depends on the sizes that came before.

    Raises:
        CheckpointError: the output folder cannot be written, has a run already (without ``config.resume``), or weights
            cannot be read or do not fit.
        AnnotationError: the data cannot be used.
        Interrupted: a signal ended it; the checkpoint is saved.
        NonFiniteLossError: a loss is NaN or infinite; ``nan_state.pth`` is saved.
    """
    device = init_from_env(choose_device(config.device))
    if is_main():
        prepare_output_folder(config.output_dir)
    barrier()
    previous = _previous_run(config)
    train_set, val_set = _datasets(config)
    args = {**config.to_args(), "num_classes": train_set.num_classes}
    _seed(config.seed)
    model = model_from_args(SimpleNamespace(**args))
    with TrainProgress(config.optim.epochs) as progress:
        if previous is None:
            _load_starting_weights(model, config, progress)
        state = TrainState.start(model.to(device), config.optim)
        _seed(config.seed + rank())
        if previous is not None:
            _continue(state, previous, args, train_set.categories, progress)
        criterion = criterion_from_args(SimpleNamespace(**args)).to(device)
        val_loader = _loader(val_set, config, training=False)
        with StopSignals() as signals:
            run = _Run(config, args, train_set, val_loader, criterion, device, progress, signals)
            return run.fit(state, _loader(train_set, config, training=True))


@dataclass
class _Run:
    """What happens around the epochs."""

    config: TrainConfig
    args: dict[str, Any]
    train_set: CocoDetection | CocoPanoptic
    val_loader: DataLoader[Any]
    criterion: nn.Module
    device: torch.device
    progress: TrainProgress
    signals: StopSignals
    stats: dict[str, float] = field(default_factory=dict)

    def fit(self, state: TrainState, train_loader: DataLoader[Any]) -> TrainResult:
        hooks = FitHooks(on_step=self.progress.step, should_stop=self.signals, log_every=self.config.log_every)
        options = self.config.optim
        try:
            fit(state.model, self.criterion, train_loader, options, state=state, on_epoch=self.on_epoch, hooks=hooks)
        except Interrupted as stop:
            if not stop.at_once:  # else the epoch's checkpoint is on the disk, and nothing was trained since
                self._save(self._checkpoint(state), CHECKPOINT)
            self.progress.note(f"interrupted: saved {self.config.output_dir / CHECKPOINT}, continue it with --resume")
            raise
        except NonFiniteLossError as error:
            self._save({**self._checkpoint(state), **vars(error)}, NAN_STATE)
            raise NonFiniteLossError(
                f"{error}; the state is saved in {self.config.output_dir / NAN_STATE}", **vars(error)
            ) from None
        return TrainResult(state, state.best, self.stats, self.config.output_dir)

    def on_epoch(self, state: TrainState, report: EpochReport) -> None:
        # Saved before the evaluation, so that a run killed in it has lost nothing.
        checkpoint = self._checkpoint(state)
        self._save(checkpoint, CHECKPOINT)
        if self.config.save_every and (report.epoch + 1) % self.config.save_every == 0:
            self._save(checkpoint, f"checkpoint{report.epoch:04}.pth")
        with self.signals.at_once():
            val_losses = self._evaluate(state)
        score = self.stats["PQ" if "PQ" in self.stats else "AP"]
        if state.best is None or score > state.best:
            checkpoint["best"] = state.best = score
            self._save(checkpoint, BEST)
            self._save(checkpoint, CHECKPOINT)
        self._log(report, val_losses)
        self.progress.epoch(report, self.stats)

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        # The evaluation leaves no trace in the random numbers: a run resumed from before it goes on as this one.
        before = random_state()
        postprocess, evaluator = self._evaluator()
        coco_result, losses = evaluate(
            state.eval_model,
            self.val_loader,
            postprocess=postprocess,
            evaluator=evaluator,
            device=self.device,
            criterion=self.criterion,
            amp=self.config.optim.amp,
        )
        set_random_state(before)
        self.stats = dict(coco_result.stats)
        weights: dict[str, float] = self.criterion.weight_dict  # type: ignore[assignment]
        return {name: value * weights.get(name, 1.0) for name, value in losses.items()}

    def _evaluator(self) -> tuple[nn.Module, CocoEvaluator | PanopticEvaluator]:
        if self.config.val_segments is not None:
            names, things = self.train_set.categories, self.train_set.is_thing_map
            panoptic = PanopticEvaluator(self.config.val_annotations, self.config.val_segments, names=names)
            known = {**(things or {}), **panoptic.is_thing_map}
            return PostProcessPanoptic(things_of_every_class(self.args["num_classes"], known)), panoptic
        return PostProcess(), CocoEvaluator(self.config.val_annotations, (self.measured,))

    @property
    def measured(self) -> str:
        """What the evaluation measures: "panoptic" quality, or the average precision of "segm" or of "bbox"."""
        if self.config.val_segments is not None:
            return "panoptic"
        return "segm" if self.config.model.masks else "bbox"

    def _checkpoint(self, state: TrainState) -> dict[str, Any]:
        data = {"categories": self.train_set.categories, "is_thing_map": self.train_set.is_thing_map}
        return {**state.checkpoint(), "args": self.args, **data}

    def _save(self, checkpoint: Mapping[str, Any], name: str) -> None:
        if is_main():
            save_checkpoint(checkpoint, self.config.output_dir / name)

    def _log(self, report: EpochReport, val_losses: Mapping[str, float]) -> None:
        line = {
            "epoch": report.epoch,
            **{f"train_{name}": value for name, value in report.losses.items()},
            **{f"val_{name}": value for name, value in val_losses.items()},
            "lr": report.lr,
            f"coco_{self.measured}": self.stats,
            "seconds": round(report.seconds, 3),
            "images_per_second": round(report.images / max(report.seconds, 1e-9), 3),
            "memory_bytes": peak_memory(),
        }
        if is_main():
            append_line(self.config.output_dir / LOG, json.dumps(line))


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, on a line of its own even where a killed run left half a line."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")


def choose_device(name: str) -> str:
    """The device's name for ``name``; "auto" is cuda where there is a GPU, else cpu.

    Raises:
        ValueError: it is a GPU, and torch finds none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is here, got {name!r}, and torch finds no GPU")
    return name


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _previous_run(config: TrainConfig) -> dict[str, Any] | None:
    path = config.output_dir / CHECKPOINT
    if not path.exists():
        return None
    if not config.resume:
        raise CheckpointError(f"{path} exists: continue that run with --resume, or take another output folder")
    return load_checkpoint(path)


def _continue(
    state: TrainState,
    previous: dict[str, Any],
    args: Mapping[str, Any],
    categories: dict[int, str],
    progress: TrainProgress,
) -> None:
    saved = previous["args"]
    for name in sorted(args.keys() - MAY_CHANGE):
        if name in saved and saved[name] != args[name]:
            raise CheckpointError(
                f"--resume continues a run as it was: {name} was {saved[name]!r}, now it is {args[name]!r}"
            )
    if previous.get("categories", categories) != categories:
        raise CheckpointError("--resume continues a run as it was: the categories of the training data have changed")
    state.restore(previous)
    processes = len(previous["random_state"])
    if processes != world_size():
        progress.note(f"the run was on {processes} processes, now {world_size()}: it continues, but not exactly")
    progress.note(f"continuing after epoch {state.epoch + 1}")


def _datasets(config: TrainConfig) -> tuple[CocoDetection | CocoPanoptic, CocoDetection | CocoPanoptic]:
    # The paper's crop sizes in proportion to the scales: at the paper's scales they are the paper's.
    part = max(config.scales) / max(PAPER_SCALES)
    augmentation = train_transforms(
        config.scales,
        config.max_size,
        crop_scales=[round(size * part) for size in (400, 500, 600)],
        crop_range=(round(384 * part), round(600 * part)),
    )
    at_test = eval_transforms(max(config.scales), config.max_size)
    masks = config.model.masks
    train_set = open_dataset(
        config.train_images,
        config.train_annotations,
        config.train_segments,
        augmentation,
        masks=masks,
        # A crop is of a picture that was scaled to less.
        shortest=max(config.scales) if config.reduced_decoding else None,
    )
    val_set = open_dataset(config.val_images, config.val_annotations, config.val_segments, at_test, masks=masks)
    for category, name in val_set.categories.items():
        if train_set.categories.get(category) != name:
            raise AnnotationError(
                f"{config.val_annotations}: category {category} is {name!r}, "
                f"in {config.train_annotations} it is {train_set.categories.get(category, 'absent')!r}"
            )
    smallest = config.batch_size * world_size()
    if len(train_set) < smallest:
        raise AnnotationError(
            f"{config.train_annotations} has {len(train_set)} images, batch size times processes is {smallest}"
        )
    return train_set, val_set


def _loader(dataset: CocoDetection | CocoPanoptic, config: TrainConfig, *, training: bool) -> DataLoader[Any]:
    # With one process too: the order is then a function of seed and epoch alone, which is what resuming needs.
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, world_size(), rank(), shuffle=training, seed=config.seed
    )
    return DataLoader(
        dataset,
        config.batch_size,
        sampler=sampler,
        drop_last=training,
        collate_fn=collate,
        num_workers=config.num_workers,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
    )


def _start_worker(worker_id: int) -> None:
    seed_worker(worker_id)
    # Ctrl-C goes to every process of the terminal; the main one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _load_starting_weights(model: Any, config: TrainConfig, progress: TrainProgress) -> None:
    # One process after the other, so that a download happens once.
    if not is_main():
        barrier()
    if config.pretrained is not None:
        checkpoint = load_checkpoint(config.pretrained)
        weights = checkpoint.get("ema") or checkpoint["model"]
        reset = load_weights(model, weights, reset_class_head=config.reset_class_head)
        progress.note(f"weights from {config.pretrained}" + (f"; started anew: {', '.join(reset)}" if reset else ""))
    elif config.frozen_weights is not None:
        checkpoint = load_checkpoint(config.frozen_weights)
        load_weights(model.detr, checkpoint.get("ema") or checkpoint["model"])
        progress.note(f"detector from {config.frozen_weights}, frozen")
    elif config.backbone_weights != "none" and config.model.backbone in IMAGENET_URLS:
        try:
            load_backbone_weights(model, config.model.backbone, config.backbone_weights)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; --backbone-weights takes a file of them, or none") from error
        progress.note(f"backbone from {config.backbone_weights}")
    if is_main():
        barrier()
