"""The training loop: everything between a ready model and a trained one. Files and evaluation are the caller's.

One update is: forward and backward of ``accumulate`` batches, the gradient's norm and clipping, a check that all of it
is finite, the optimizer, the moving average. Nothing in it waits for a CUDA device but the check, one update late.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detr_fast.config import OptimConfig
from detr_fast.criterion import SetCriterion
from detr_fast.data.batch import ImageBatch
from detr_fast.data.on_device import DeviceBatch, on_device
from detr_fast.data.target_batch import TargetBatch
from detr_fast.distributed import all_gather_objects, is_distributed, mean_over_processes, world_size
from detr_fast.finite import FiniteGuard, image_ids
from detr_fast.graphed_step import GraphedStep, Update, why_not_graphed
from detr_fast.ops import PaddedTargets
from detr_fast.targets import check_targets
from detr_fast.train_forward import train_forward
from detr_fast.train_state import TrainState

Losses = dict[str, Tensor]


class Interrupted(Exception):
    """A signal asked training to stop.

    Attributes:
        signum: its number.
        at_once: it struck between epochs, in work that was left half done; else the last update is complete.
    """

    def __init__(self, signum: int, *, at_once: bool = False) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum
        self.at_once = at_once


@dataclass(frozen=True)
class StepReport:
    """How an epoch is going, read every ``log_every`` updates.

    Attributes:
        epoch, step, steps: the epoch, updates done in it, updates in all of it.
        loss: the weighted loss, averaged over the updates since the last report and this process's images.
        images: images so far in this epoch, of all processes.
        seconds: since the epoch began.
        lr: the learning rate of all but the backbone.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    images: int
    seconds: float
    lr: float


@dataclass(frozen=True)
class EpochReport:
    """What an epoch came to.

    Attributes:
        epoch: its number, from 0.
        losses: "loss", and every loss by its name (those in the weighted sum with their weight, so that they add up to
            "loss"), averaged over the epoch's batches and all processes.
        lr: the learning rate of all but the backbone, in the last update.
        images: images seen, of all processes.
        seconds: how long it took.
    """

    epoch: int
    losses: dict[str, float]
    lr: float
    images: int
    seconds: float


@dataclass(frozen=True)
class FitHooks:
    """What the caller wants to hear and to decide; each may be absent.

    Attributes:
        on_step: called with a StepReport every ``log_every`` updates.
        should_stop: asked before every update; a signal's number ends training with ``Interrupted``.
        lr_factor: learning rates are their first values times ``lr_factor(done)``, ``done`` from 0 to 1 being the part
            of the updates or of ``max_seconds`` that is over, whichever is more. In place of the drop at ``lr_drop``.
        max_seconds: training ends, in the middle of an epoch if need be, after this time with everything that
            ``on_epoch`` does; that epoch is reported as usual.
        log_every: updates between two StepReports.
    """

    on_step: Callable[[StepReport], None] | None = None
    should_stop: Callable[[], int] | None = None
    lr_factor: Callable[[float], float] | None = None
    max_seconds: float | None = None
    log_every: int = 10


def fit(
    model: nn.Module,
    criterion: nn.Module,
    train_loader: DataLoader[Any],
    options: OptimConfig,
    *,
    state: TrainState | None = None,
    on_epoch: Callable[[TrainState, EpochReport], None] | None = None,
    hooks: FitHooks | None = None,
) -> TrainState:
    """Train ``model`` in place, from ``state.epoch + 1`` to ``options.epochs``.

    In a process group it trains data-parallel: gradients are averaged over the processes.

    Args:
        model: where it will be trained (its parameters' device is the device).
        criterion: (outputs, targets) to losses by name, with ``weight_dict`` and ``num_classes``.
        train_loader: gives (ImageBatch, targets), as ``detr_fast.data.batch.collate`` makes them; has a length. A
            sampler with ``set_epoch`` is told the epoch.
        options: the optimisation.
        state: continue from here; None starts anew.
        on_epoch: called after every epoch, on every process.
        hooks: see FitHooks.

    Returns:
        The state after the last epoch.

    Raises:
        Interrupted: ``hooks.should_stop`` asked for it.
        NonFiniteLossError: a loss or gradient is NaN or infinite; that update has not touched the weights.
        ValueError: a target cannot be trained on, and the message names its image; or ``train_loader`` is empty, or not
            as long on every process; or ``options`` ask for what cannot be done here.
    """
    _check_batches(all_gather_objects(len(train_loader)))
    loop = _Loop(criterion, train_loader, options, state or TrainState.start(model, options), hooks or FitHooks())
    for epoch in range(loop.state.epoch + 1, options.epochs):
        report = loop.run_epoch(epoch)
        if loop.hooks.lr_factor is None:
            loop.state.schedule.step()
        loop.state.epoch = epoch
        if on_epoch is not None:
            on_epoch(loop.state, report)
        if loop.time_is_over():
            break
    return loop.state


def _check_batches(counts: Sequence[int]) -> None:
    if min(counts) == 0:
        raise ValueError("train_loader has no batch: are there fewer images than the batch size times the processes?")
    if min(counts) != max(counts):
        raise ValueError(f"train_loader must have the same number of batches on every process, got {list(counts)}")


@dataclass
class _Loop:
    criterion: nn.Module
    loader: DataLoader[Any]
    options: OptimConfig
    state: TrainState
    hooks: FitHooks
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.device = next(self.state.model.parameters()).device
        self.criterion.to(self.device)
        self.forward = train_forward(self.state.model, self.options, self.device)
        self.guard = FiniteGuard(self.state.optimizer, self.device)
        # Requests to stop go over the host, so that asking for them does not wait for a GPU.
        self.control = dist.new_group(backend="gloo") if is_distributed() else None
        self.parameters = [parameter for parameter in self.state.model.parameters() if parameter.requires_grad]
        self.graphs = self._graphs() if self.options.cuda_graph else None
        self.steps = -(-len(self.loader) // self.options.accumulate)

    def _graphs(self) -> GraphedStep:
        reason = why_not_graphed(self.device, self.criterion)
        if reason is not None:
            raise ValueError(f"cuda_graph cannot be used here: {reason}")
        criterion = cast(SetCriterion, self.criterion)  # others have a reason
        return GraphedStep(self._update_on_device, self.state.optimizer, held=criterion.held)

    def run_epoch(self, epoch: int) -> EpochReport:
        self.forward.train()
        self.criterion.train()
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(epoch)
        started, images, meter = time.monotonic(), 0, LossMeter(self.criterion.weight_dict)  # type: ignore[arg-type]
        batches = on_device(self._checked_batches(), self.device)
        for done, group in enumerate(_groups(batches, self.options.accumulate), start=1):
            lr = self._set_lr(epoch, done - 1)
            with self.graphs.turn() if self.graphs is not None else contextlib.nullcontext():
                self._update(epoch, group, meter)
            images += world_size() * sum(len(batch.on_host) for batch in group)
            if done % self.hooks.log_every == 0 or done == self.steps:
                loss, seconds = meter.recent(), time.monotonic() - started
                if self.hooks.on_step is not None:
                    self.hooks.on_step(StepReport(epoch, done, self.steps, loss, images, seconds, lr))
            if self.time_is_over():
                break
        self.guard.finish()
        return EpochReport(epoch, meter.averages(), lr, images, time.monotonic() - started)

    def _checked_batches(self) -> Iterator[tuple[ImageBatch, TargetBatch]]:
        for images, targets in self.loader:
            # Here they are still on the host, where looking at their values is free.
            try:
                check_targets(targets, self.criterion.num_classes)  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"{error} (image ids of this batch: {image_ids(targets)})") from None
            yield images, TargetBatch.of(targets)

    def _update(self, epoch: int, group: Sequence[DeviceBatch], meter: LossMeter) -> None:
        if self.graphs is None or not self._update_by_graph(self.graphs, epoch, group[0], meter):
            self._update_by_calls(epoch, group, meter)
        self.state.step += 1
        if self.state.ema is not None:
            self.state.ema.update(self.state.model)

    def _update_by_calls(self, epoch: int, group: Sequence[DeviceBatch], meter: LossMeter) -> None:
        self.state.optimizer.zero_grad()
        for index, (images, targets, on_host) in enumerate(group):
            # Gradients are exchanged once an update, with the last batch.
            last = index == len(group) - 1
            with contextlib.nullcontext() if last or not is_distributed() else self.forward.no_sync():  # type: ignore[operator]
                losses, total = self._losses(images, targets)
                (total / len(group) if len(group) > 1 else total).backward()
            meter.add(losses, total)
            self.guard.saw(on_host, losses, total)
        norm = clip_gradients(self.parameters, self.options.clip_max_norm, self.state.optimizer)
        self.guard.check(norm, epoch, self.state.step)
        self.state.optimizer.step()
        if self.graphs is not None:
            self.state.optimizer.zero_grad()  # a graph has memory of its own for gradients

    def _update_by_graph(self, graphs: GraphedStep, epoch: int, batch: DeviceBatch, meter: LossMeter) -> bool:
        """Whether this batch is one for ``graphs``, which then have updated the weights by it."""
        update = graphs(batch.images, batch.targets)
        if update is not None:
            meter.add(update.losses, update.total)
            self.guard.saw(batch.on_host, update.losses, update.total)
            self.guard.expect(update.finite, epoch, self.state.step)
        return update is not None

    def _update_on_device(self, images: ImageBatch, targets: PaddedTargets) -> Update:
        """What ``_update_by_calls`` does for one batch, without what concerns the host."""
        self.state.optimizer.zero_grad()
        losses, total = self._losses(images, targets)
        total.backward()
        norm = clip_gradients(self.parameters, self.options.clip_max_norm, self.state.optimizer)
        finite = self.guard.hold_back(norm, [total.detach()])
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        return Update({name: loss.detach() for name, loss in losses.items()}, total.detach(), finite)

    def _losses(self, images: ImageBatch, targets: TargetBatch | PaddedTargets) -> tuple[Losses, Tensor]:
        # A graph must not hold the copies of weights in bfloat16 that autocast keeps.
        cache = not self.options.cuda_graph
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp, cache_enabled=cache):
            outputs = self.forward(images)
        try:
            padded = isinstance(targets, PaddedTargets)
            losses = (self.criterion.of_padded if padded else self.criterion)(outputs, targets)  # type: ignore[operator]
        except ValueError:
            # A strict matcher refuses NaN costs. With a NaN loss in its place every process stops at the same update.
            heads = outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()
            if bool(heads.isfinite()):  # waits for the device, in an error's path
                raise
            return {"pred_logits and pred_boxes": heads.detach()}, heads * float("nan")
        return losses, self._total(losses)

    def _total(self, losses: Losses) -> Tensor:
        if isinstance(self.criterion, SetCriterion):
            return self.criterion.total(losses)
        weights: dict[str, float] = self.criterion.weight_dict  # type: ignore[assignment]
        return torch.stack([losses[name] * weight for name, weight in weights.items() if name in losses]).sum()

    def _set_lr(self, epoch: int, done: int) -> float:
        groups = self.state.optimizer.param_groups
        if self.hooks.lr_factor is not None:
            factor = self.hooks.lr_factor(self._part_done(epoch, done))
            for group in groups:
                group["lr"] = group["initial_lr"] * factor
        return groups[0]["lr"]

    def _part_done(self, epoch: int, done: int) -> float:
        of_steps = (epoch + done / self.steps) / self.options.epochs
        of_time = (time.monotonic() - self.started) / self.hooks.max_seconds if self.hooks.max_seconds else 0.0
        return min(max(of_steps, of_time), 1.0)

    def time_is_over(self) -> bool:
        """Whether ``max_seconds`` are over; raise where a signal came. The same answer on every process."""
        late = self.hooks.max_seconds is not None and time.monotonic() - self.started >= self.hooks.max_seconds
        request = torch.tensor([self.hooks.should_stop() if self.hooks.should_stop else 0, int(late)])
        if is_distributed():
            dist.all_reduce(request, dist.ReduceOp.MAX, group=self.control)
        signum, over = request.tolist()  # on the host
        if signum:
            self.guard.finish()
            raise Interrupted(signum)
        return bool(over)


class LossMeter:
    """Averages of losses. Adding does not wait for the device; reading does."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.names: list[str] = []
        self.unread: Tensor | None = None  # [1 + losses], summed on the device since the last reading
        self.unread_count = 0
        self.totals: Tensor | None = None  # the same, all readings, float64 on the host
        self.count = 0
        self.last_loss = float("nan")

    def add(self, losses: Losses, total: Tensor) -> None:
        """Take in one batch's losses and their weighted sum."""
        self.names = self.names or list(losses)
        values = torch.stack([total.detach(), *(losses[name].detach() for name in self.names if name in losses)])
        self.unread = values if self.unread is None else self.unread + values
        self.unread_count += 1

    def recent(self) -> float:
        """The weighted sum, averaged since the last reading."""
        if self.unread is not None:
            values = self.unread.cpu().double()
            self.last_loss = values[0].item() / self.unread_count
            self.totals = values if self.totals is None else self.totals + values
            self.count += self.unread_count
            self.unread, self.unread_count = None, 0
        return self.last_loss

    def averages(self) -> dict[str, float]:
        """All of them, over every batch and process; losses with a weight have it applied."""
        self.recent()
        assert self.totals is not None
        device = "cuda" if is_distributed() and dist.get_backend() == "nccl" else "cpu"
        means = mean_over_processes((self.totals / self.count).to(device)).tolist()
        named = {name: mean * self.weights.get(name, 1.0) for name, mean in zip(self.names, means[1:], strict=True)}
        return {"loss": means[0], **named}


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, optimizer: torch.optim.Optimizer) -> Tensor:
    """Have the next step scale all gradients together to a norm of at most ``max_norm`` (0: not); returns their norm.

    As ``nn.utils.clip_grad_norm_``, in the pass in which a fused optimizer reads the gradients anyway: 10 of 58 ms for
    DETR-R50's 41 million on two cores. Until then they are as they were.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    # What they are divided by, in float32 whatever they are.
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1).float() if max_norm else None  # type: ignore[attr-defined]
    return norm


def _groups(batches: Iterable[DeviceBatch], size: int) -> Iterator[list[DeviceBatch]]:
    """The batches of each update: ``size`` of them, fewer at the end."""
    left = iter(batches)
    while group := list(itertools.islice(left, size)):
        yield group
