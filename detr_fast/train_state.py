"""What changes while training: weights, optimizer, schedule, average, counters, random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from detr_fast.checkpoint import CheckpointError, load_weights, random_state, set_random_state
from detr_fast.config import OptimConfig
from detr_fast.distributed import all_gather_objects, rank, world_size
from detr_fast.ema import ModelEma


@dataclass
class TrainState:
    """What changes while training, as it goes into a checkpoint.

    Attributes:
        model: the model itself, never wrapped.
        optimizer, schedule: AdamW with the paper's two groups, and its drop of the learning rate.
        ema: the moving average of the weights, or None.
        epoch: the last finished epoch, -1 before that.
        step: updates done.
        best: the highest score so far; the caller's.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: ModelEma | None = None
    epoch: int = -1
    step: int = 0
    best: float | None = None

    @staticmethod
    def start(model: nn.Module, options: OptimConfig) -> TrainState:
        """The state before the first update; ``model`` is where it will be trained."""
        optimizer = build_optimizer(model, options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, options.lr_drop)
        return TrainState(model, optimizer, schedule, ModelEma(model, options.ema_decay) if options.ema_decay else None)

    @property
    def eval_model(self) -> nn.Module:
        """The weights to evaluate and to predict with: the average where there is one."""
        return self.model if self.ema is None else self.ema.model

    def checkpoint(self) -> dict[str, Any]:
        """Entries as in ``detr_fast.checkpoint``. Every process must call it, after the same update."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.schedule.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "ema": None if self.ema is None else self.ema.model.state_dict(),
            "ema_updates": 0 if self.ema is None else self.ema.updates,
            "random_state": all_gather_objects(random_state()),
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from ``checkpoint()``'s entries.

        The random state comes back where as many processes run as did then; otherwise the present one stays.

        Raises:
            CheckpointError: an entry is missing or does not fit this model.
        """
        missing = sorted({"optimizer", "lr_scheduler", "epoch", "step", "random_state"} - checkpoint.keys())
        if missing:
            raise CheckpointError(f"the checkpoint has no {', '.join(missing)}: it is no run that can be continued")
        load_weights(self.model, checkpoint["model"])
        self.optimizer.load_state_dict(_with_fused(checkpoint["optimizer"]))
        self.schedule.load_state_dict(checkpoint["lr_scheduler"])
        self.epoch, self.step, self.best = checkpoint["epoch"], checkpoint["step"], checkpoint.get("best")
        self._restore_ema(checkpoint)
        if len(checkpoint["random_state"]) == world_size():
            set_random_state(checkpoint["random_state"][rank()])

    def _restore_ema(self, checkpoint: dict[str, Any]) -> None:
        if self.ema is None:
            return
        if not checkpoint.get("ema"):
            raise CheckpointError("the checkpoint has no averaged weights ('ema'), and ema_decay is set")
        load_weights(self.ema.model, checkpoint["ema"])
        self.ema.updates = checkpoint["ema_updates"]


def build_optimizer(model: nn.Module, options: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one group for the backbone and one for the rest, in the original's order."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in trained if "backbone" not in name]},
        {"params": [parameter for name, parameter in trained if "backbone" in name], "lr": options.lr_backbone},
    ]
    # Fused: one kernel for all parameters, and it can be told on the device to leave them alone (see FiniteGuard).
    return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay, fused=True)


def _with_fused(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    groups = [{**group, "fused": True} for group in optimizer_state["param_groups"]]
    return {**optimizer_state, "param_groups": groups}
