"""The targets of a batch in one piece of memory, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.ops import PackedTargets

# Bytes. Each key's tensors start at a multiple of it: no dtype needs more, and vector loads like it.
ALIGNMENT = 64


class _Place(NamedTuple):
    """Where a tensor of one image's target lies in the buffer."""

    image: int
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes

    @property
    def end(self) -> int:
        return self.start + self.dtype.itemsize * prod(self.shape)

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)


class TargetBatch(list[dict[str, Any]]):
    """B targets, dicts of tensors as a criterion takes them, all of them views of one buffer.

    Each key's tensors lie one behind the other, so labels and boxes of the whole batch are there without being
    concatenated: see ``packed``. The dicts may be changed; then they are no views, and are packed anew when needed.

    A ``DataLoader`` pins it, and its workers send it as one tensor. ``torch.save`` takes it as a whole; the
    tensors of one dict alone have to be cloned, because it refuses views of one memory that differ in dtype.

    Args:
        buffer: [bytes] uint8.
        places: the tensors in it.
        others: B dicts of what is in no buffer: values that are no plain tensors.
    """

    def __init__(self, buffer: Tensor, places: Sequence[_Place], others: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(dict(other) for other in others)
        self.buffer, self.places, self.others = buffer, tuple(places), tuple(others)
        for place in places:
            self[place.image][place.key] = place.view(buffer)
        self._as_made = [dict(target) for target in self]
        labels, boxes = self._joined("labels"), self._joined("boxes")
        self._packed: PackedTargets | None = None
        if labels is not None and boxes is not None:
            counts = [place.shape[0] for place in self.places if place.key == "labels"]
            self._packed = PackedTargets(labels, boxes, counts)

    @staticmethod
    def of(targets: Sequence[Mapping[str, Any]]) -> TargetBatch:
        """Copy the tensors of ``targets``, which lie on one device, into one buffer; one that has it is passed on."""
        if isinstance(targets, TargetBatch) and targets._is_intact():
            return targets
        places = list(_places(targets))
        others = [{key: value for key, value in target.items() if not _is_plain(value)} for target in targets]
        values = [targets[place.image][place.key] for place in places]
        device = values[0].device if values else None
        buffer = torch.empty(places[-1].end if places else 0, dtype=torch.uint8, device=device)
        for place, value in zip(places, values, strict=True):
            place.view(buffer).copy_(value)
        return TargetBatch(buffer, places, others)

    def packed(self) -> PackedTargets | None:
        """Labels and boxes of the whole batch; None where the dicts were changed, or hold no such tensors."""
        return self._packed if self._holds("labels", "boxes") else None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TargetBatch:
        """The same batch on ``device``, moved at once."""
        batch = TargetBatch.of(self)
        buffer = batch.buffer.to(device, non_blocking=non_blocking)
        moved = [
            {key: value.to(device) if isinstance(value, Tensor) else value for key, value in other.items()}
            for other in batch.others
        ]
        return batch if buffer is batch.buffer else TargetBatch(buffer, batch.places, moved)

    def pin_memory(self) -> TargetBatch:
        """The same batch in page-locked memory; a ``DataLoader(pin_memory=True)`` calls this."""
        batch = TargetBatch.of(self)
        return TargetBatch(batch.buffer.pin_memory(), batch.places, batch.others)

    def __reduce__(self) -> tuple[Any, ...]:
        batch = TargetBatch.of(self)
        return TargetBatch, (batch.buffer, batch.places, batch.others)

    def _joined(self, key: str) -> Tensor | None:
        """All images' tensors of a key, one behind the other; None where they are not of one kind."""
        places = [place for place in self.places if place.key == key]
        kinds = {(place.dtype, place.shape[1:]) for place in places if place.shape}
        if len(places) != len(self) or len(kinds) != 1:
            return None
        rows = sum(place.shape[0] for place in places)
        return places[0]._replace(shape=(rows, *places[0].shape[1:])).view(self.buffer)

    def _is_intact(self) -> bool:
        """Whether the dicts hold what they were made with, and nothing else."""
        keys = {key for target in self._as_made for key in target}
        return [target.keys() for target in self] == [made.keys() for made in self._as_made] and self._holds(*keys)

    def _holds(self, *keys: str) -> bool:
        """Whether under these keys the dicts hold what they were made with."""
        return len(self) == len(self._as_made) and all(
            target.get(key) is made.get(key) for target, made in zip(self, self._as_made, strict=True) for key in keys
        )


def _places(targets: Sequence[Mapping[str, Any]]) -> Iterator[_Place]:
    """Where each tensor goes: key by key, and image by image."""
    end = 0
    for key in dict.fromkeys(key for target in targets for key in target):
        end = -(-end // ALIGNMENT) * ALIGNMENT
        for image, target in enumerate(targets):
            if key in target and _is_plain(target[key]):
                dtype = target[key].dtype
                start = -(-end // dtype.itemsize) * dtype.itemsize
                place = _Place(image, key, dtype, tuple(target[key].shape), start)
                end = place.end
                yield place


def _is_plain(value: Any) -> bool:
    # A subclass knows more than its numbers.
    return type(value) is Tensor and value.layout == torch.strided and not value.requires_grad
