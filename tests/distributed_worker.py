"""What each of several gloo processes does in the tests of data-parallel training."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from small import small_criterion, small_detr, small_segm
from torch import Tensor, nn
from training_data import loader

from detr_fast.config import OptimConfig
from detr_fast.finite import NonFiniteLossError
from detr_fast.fit import EpochReport, FitHooks, Interrupted, fit
from detr_fast.train_state import TrainState

Samples = list[tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Case:
    """A job for all processes: ``job(share, **settings)`` on each."""

    job: Callable[..., Any]
    shares: list[Samples]
    settings: dict[str, Any] = field(default_factory=dict)


def run_cases(folder: Path, cases: dict[str, Case], processes: int = 2) -> list[dict[str, Any]]:
    """Run all cases in the same gloo processes, whose start is what takes time; returns each one's results by name."""
    multiprocessing.start_processes(_process, (str(folder), cases, processes), nprocs=processes, start_method="spawn")
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(processes)]


def _process(number: int, folder: str, cases: dict[str, Case], processes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=number,
        world_size=processes,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {name: case.job(case.shares[number], **case.settings) for name, case in cases.items()}
    torch.save(results, f"{folder}/{number}.pt")
    dist.destroy_process_group()


def gradients(share: Samples, *, weights: dict[str, Tensor], ce: float, accumulate: int = 1) -> dict[str, Tensor]:
    """The gradient of one update, with weight ``ce`` of the classification loss; in float64, so that it is exact."""
    model = small_detr().double()
    share = [(image.double(), {**target, "boxes": target["boxes"].double()}) for image, target in share]
    model.load_state_dict(weights)
    criterion = small_criterion()
    criterion.weight_dict["loss_ce"] = ce
    options = OptimConfig(epochs=1, clip_max_norm=0, lr=0, lr_backbone=0, accumulate=accumulate)
    state = fit(model, criterion, loader(share, len(share) // accumulate), options)
    assert state.step == 1
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def mask_gradients(share: Samples, *, weights: dict[str, Tensor], ce: float) -> dict[str, Tensor]:
    """As ``gradients``, of a model with a mask head: all its parameters have one."""
    model = small_segm().double()
    model.load_state_dict(weights)
    share = [(image.double(), {**target, "boxes": target["boxes"].double()}) for image, target in share]
    criterion = small_criterion(masks=True)
    criterion.weight_dict["loss_ce"] = ce
    fit(model, criterion, loader(share, len(share)), OptimConfig(epochs=1, clip_max_norm=0, lr=0, lr_backbone=0))
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def trained(share: Samples, *, epochs: int) -> dict[str, Tensor]:
    """The weights after some epochs, from weights that differ between the processes to begin with."""
    model = small_detr()
    fit(model, small_criterion(), loader(share), OptimConfig(epochs=epochs))
    return model.state_dict()


def resumed(share: Samples) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after three epochs with dropout, in one go and from a checkpoint after the first."""
    options = OptimConfig(epochs=3)
    model, saved = small_detr(dropout=0.3), {}
    torch.manual_seed(dist.get_rank())

    def keep(state: TrainState, report: EpochReport) -> None:
        if report.epoch == 0:
            saved.update(copy.deepcopy(state.checkpoint()))

    fit(model, small_criterion(), loader(share), options, on_epoch=keep)
    state = TrainState.start(small_detr(dropout=0.3), options)
    state.restore(saved)
    fit(state.model, small_criterion(), loader(share), options, state=state)
    return model.state_dict(), state.model.state_dict()


class PoisonedFor(nn.Module):
    """A criterion whose class loss is NaN where image ``bad`` is in the batch."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.inner, self.bad = small_criterion(), bad
        self.weight_dict, self.num_classes = self.inner.weight_dict, self.inner.num_classes

    def forward(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        losses = self.inner(outputs, targets)
        if any(int(target["image_id"]) == self.bad for target in targets):
            losses["loss_ce"] = losses["loss_ce"] + float("nan")
        return losses


def not_finite(share: Samples, *, bad: int) -> tuple[str, int, dict[str, Tensor]]:
    """(message, updates done, weights) where one process's loss is NaN."""
    state = TrainState.start(small_detr(), OptimConfig())
    try:
        fit(state.model, PoisonedFor(bad), loader(share), OptimConfig(), state=state)
    except NonFiniteLossError as error:
        return str(error), state.step, state.model.state_dict()
    raise AssertionError("the loss was finite")


def stopped(share: Samples, *, stopping: int) -> tuple[int, int]:
    """(signal, updates done) where process ``stopping`` alone was asked to stop after its third update."""
    state = TrainState.start(small_detr(), OptimConfig())
    hooks = FitHooks(should_stop=lambda: 15 if state.step == 3 and dist.get_rank() == stopping else 0)
    try:
        fit(state.model, small_criterion(), loader(share), OptimConfig(), state=state, hooks=hooks)
    except Interrupted as stop:
        return stop.signum, state.step
    raise AssertionError("it did not stop")


def refused(share: Samples) -> str:
    """What is said where the processes have different numbers of batches."""
    try:
        fit(small_detr(), small_criterion(), loader(share), OptimConfig())
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")
