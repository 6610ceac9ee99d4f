"""A loss that is not finite: found without waiting for the device, kept away from the weights, reported by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from detr_fast.data.batch import Target
from detr_fast.distributed import all_gather_objects, is_distributed


class NonFiniteLossError(RuntimeError):
    """A loss or the gradient is NaN or infinite. The weights are those before this update.

    Attributes:
        image_ids: images of the batches whose loss is not finite; of all batches, where only the gradient is not.
        terms: the losses that are not finite.
        targets: the targets of those images, on the CPU.
    """

    def __init__(self, message: str, image_ids: list[int | str], terms: list[str], targets: list[Target]) -> None:
        super().__init__(message)
        self.image_ids = image_ids
        self.terms = terms
        self.targets = targets


def image_ids(targets: Sequence[Target]) -> list[int | str]:
    """The images' ids; "?" where a target has none. Reads the targets, so they should be on the host."""
    return [int(target["image_id"]) if "image_id" in target else "?" for target in targets]


@dataclass
class _Seen:
    """One batch of an update."""

    targets: Sequence[Target]
    losses: dict[str, Tensor]
    total: Tensor

    def bad_terms(self) -> list[str]:
        bad = [name for name, value in self.losses.items() if not bool(value.isfinite())]
        return bad or ([] if bool(self.total.isfinite()) else ["loss"])


@dataclass
class _Update:
    epoch: int
    step: int
    seen: list[_Seen]
    finite: Tensor  # scalar on the host, 1 or 0; on its way there until ``arrived``
    arrived: Any = None  # torch.cuda.Event


@dataclass
class FiniteGuard:
    """Checks every update before the optimizer takes it.

    On the CPU the check is at once. On CUDA the answer is copied to the host without waiting, and read when the next
    update is checked; meanwhile the fused optimizer, told by its ``found_inf``, leaves the weights as they are.
    """

    optimizer: torch.optim.Optimizer
    device: torch.device
    seen: list[_Seen] = field(default_factory=list)
    pending: _Update | None = None

    def saw(self, targets: Sequence[Target], losses: dict[str, Tensor], total: Tensor) -> None:
        """Note a batch of the coming update; its targets are best on the host."""
        self.seen.append(_Seen(targets, {name: value.detach() for name, value in losses.items()}, total.detach()))

    def check(self, norm: Tensor, epoch: int, step: int) -> None:
        """Check the update whose batches were noted and whose gradient has this norm.

        Every process must call it; all of them raise, or none.

        Raises:
            NonFiniteLossError: this update is not finite; on CUDA, the one before.
        """
        self.expect(self.hold_back(norm, [batch.total for batch in self.seen]), epoch, step)

    def hold_back(self, norm: Tensor, totals: Sequence[Tensor]) -> Tensor:
        """1 where the gradient's norm and these losses are finite, else 0 and the optimizer leaves the weights alone.

        The device's part of ``check``, which a CUDA graph can hold.
        """
        finite = torch.stack([norm, *totals]).isfinite().all().float()
        if is_distributed():
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        self.optimizer.found_inf = 1 - finite  # type: ignore[attr-defined]
        return finite

    def expect(self, finite: Tensor, epoch: int, step: int) -> None:
        """The host's part of ``check``: look at what ``hold_back`` gave for the batches that were noted."""
        before, self.pending = self.pending, self._send(_Update(epoch, step, self.seen, finite))
        self.seen = []
        if before is not None:
            _raise_if_bad(before)
        if self.device.type != "cuda":
            self.finish()

    def finish(self) -> None:
        """Check what is not read yet."""
        update, self.pending = self.pending, None
        if update is not None:
            _raise_if_bad(update)

    def _send(self, update: _Update) -> _Update:
        if self.device.type == "cuda":
            on_host = torch.empty((), pin_memory=True)
            on_host.copy_(update.finite, non_blocking=True)
            update.finite, update.arrived = on_host, torch.cuda.Event()
            update.arrived.record()
        return update


def _raise_if_bad(update: _Update) -> None:
    if update.arrived is not None:
        update.arrived.synchronize()  # of an update ago: the device has usually passed it
    if bool(update.finite):
        return
    bad = [(batch, batch.bad_terms()) for batch in update.seen]
    batches = [batch for batch, terms in bad if terms] or [batch for batch, _ in bad]
    # Copies, because torch.save takes no views of one buffer that differ in dtype.
    targets = [{k: v.cpu().clone() for k, v in target.items()} for batch in batches for target in batch.targets]
    terms = sorted({name for _, names in bad for name in names})
    everyone = all_gather_objects((targets, terms))
    # A process whose own losses are finite has nothing to report, unless nobody has.
    found = [report for report in everyone if report[1]] or everyone
    _raise([target for targets, _ in found for target in targets], sorted({t for _, ts in found for t in ts}), update)


def _raise(targets: list[Target], terms: list[str], update: _Update) -> None:
    ids = image_ids(targets)
    what = f"{', '.join(terms)} not finite" if terms else "the gradient is not finite, though the losses are,"
    message = f"{what} in epoch {update.epoch}, update {update.step}; image ids of the batch: {ids}"
    raise NonFiniteLossError(message, ids, terms, targets)
