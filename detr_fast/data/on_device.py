"""Batches on their way to the device, behind its back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from detr_fast.data.batch import ImageBatch
from detr_fast.data.target_batch import TargetBatch


class DeviceBatch(NamedTuple):
    """A batch where it is trained on.

    Attributes:
        images, targets: on the device.
        on_host: the targets where they came from, whose values can be looked at without a wait.
    """

    images: ImageBatch
    targets: TargetBatch
    on_host: TargetBatch


def on_device(batches: Iterable[tuple[ImageBatch, TargetBatch]], device: torch.device) -> Iterator[DeviceBatch]:
    """Move each batch to ``device`` when it is asked for, without waiting.

    On CUDA the copies have a stream of their own: as long as nobody waits for the device, the next batch arrives while
    it still works on the one before. The sources should be in page-locked memory (``DataLoader(pin_memory=True)``).
    """
    if device.type != "cuda":
        for images, targets in batches:
            yield DeviceBatch(images.to(device, non_blocking=True), targets.to(device, non_blocking=True), targets)
        return
    copies = torch.cuda.Stream(device)
    for images, targets in batches:
        with torch.cuda.stream(copies):
            moved = DeviceBatch(images.to(device, non_blocking=True), targets.to(device, non_blocking=True), targets)
        worker = torch.cuda.current_stream(device)
        worker.wait_stream(copies)  # the device waits for the copy, the host does not
        for tensor in (moved.images.images, moved.images.mask, moved.targets.buffer):
            tensor.record_stream(worker)  # or its memory would be given to the next copy too early
        yield moved
