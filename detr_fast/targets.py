"""What training targets must look like, checked before they spoil a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detr_fast.data.batch import Target
from detr_fast.data.target_batch import TargetBatch
from detr_fast.ops import PackedTargets, _native

# Resizing and cropping in float32 may leave a box that ends at the image's border this far beyond it.
OUTSIDE_TOLERANCE = 1e-2
# A box (cx, cy, w, h) times the first plus the second: w, h, and how far its four sides are from being too far outside.
MARGINS = np.array(
    [[0, 0, 1, 0, -1, 0], [0, 0, 0, 1, 0, -1], [1, 0, -0.5, 0, -0.5, 0], [0, 1, 0, -0.5, 0, -0.5]], dtype=np.float32
)
MARGINS_AT_ZERO = np.array([0, 0, 0, 0, 1, 1], dtype=np.float32) + np.float32(OUTSIDE_TOLERANCE) * np.array(
    [0, 0, 1, 1, 1, 1], dtype=np.float32
)


def check_targets(targets: Sequence[Target], num_classes: int, batch_size: int | None = None) -> None:
    """Raise where targets cannot be trained on.

    Shapes, dtypes and keys are always checked; values only where the tensors are on the CPU, because looking at them
    elsewhere would wait for the device.

    Args:
        targets: one dict an image: "labels" [T] int64, "boxes" [T, 4] float cxcywh in [0, 1].
        num_classes: C; labels are in [0, C - 1], C itself means "no object".
        batch_size: how many targets there must be.

    Raises:
        ValueError: names the image, the object, and what is wrong with it.
    """
    _check_all_shapes(targets, batch_size)
    if targets:
        _check_values(targets, pack(targets), num_classes)


def pack(targets: Sequence[Target]) -> PackedTargets:
    """B targets, at least one, one behind the other; of a ``TargetBatch`` as they lie in its buffer already."""
    packed = targets.packed() if isinstance(targets, TargetBatch) else None
    return PackedTargets.pack(targets) if packed is None else packed


def check_and_pack(targets: Sequence[Target], num_classes: int, batch_size: int) -> PackedTargets:
    """``check_targets``, and the targets one behind the other, B of them at least one."""
    quick = _native.load().quick
    if quick is not None and len(targets) == batch_size:
        good = quick.pack(targets, num_classes)
        if good is not None:
            return PackedTargets(*good)
    _check_all_shapes(targets, batch_size)
    packed = pack(targets)
    _check_values(targets, packed, num_classes)
    return packed


def _check_all_shapes(targets: Sequence[Target], batch_size: int | None) -> None:
    if batch_size is not None and len(targets) != batch_size:
        raise ValueError(f"targets must be one dict an image: got {len(targets)} for {batch_size} images")
    for index, target in enumerate(targets):
        _check_shapes(target, index)


def _check_values(targets: Sequence[Target], packed: PackedTargets, num_classes: int) -> None:
    on_host = packed.labels.is_cpu and packed.boxes.is_cpu
    if not on_host or _values_are_good(packed.labels, packed.boxes, num_classes):
        return
    for index, target in enumerate(targets):
        _check_labels(target["labels"], index, num_classes)
        _check_boxes(target["boxes"], index)


def _check_shapes(target: Target, index: int) -> None:
    for key in ("labels", "boxes"):
        if key not in target:
            raise ValueError(f"target {index} has no {key!r}, only {sorted(target)}")
    labels, boxes = target["labels"], target["boxes"]
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels of target {index} must be int64 [T], got {labels.dtype} {list(labels.shape)}")
    if boxes.shape != (len(labels), 4) or not boxes.is_floating_point():
        raise ValueError(
            f"boxes of target {index} must be float [{len(labels)}, 4], got {boxes.dtype} {list(boxes.shape)}"
        )


def _values_are_good(all_labels: Tensor, all_boxes: Tensor, num_classes: int) -> bool:
    """All images at once, because nearly always nothing is wrong."""
    if len(all_labels) == 0:
        return True
    # NumPy, whose calls cost a fifth of torch's. A minimum with NaN is NaN, and no comparison with that holds.
    with np.errstate(invalid="ignore", over="ignore"):
        margins = all_boxes.detach().float().numpy() @ MARGINS + MARGINS_AT_ZERO
    labels = all_labels.numpy().view(np.uint64)  # where a negative number is a very large one
    return bool(margins.min() >= 0 and labels.max() < num_classes)


def _check_labels(labels: Tensor, index: int, num_classes: int) -> None:
    bad = _first((labels < 0) | (labels >= num_classes))
    if bad is None:
        return
    label = int(labels[bad])
    if label == num_classes:
        raise ValueError(
            f"label {label} of target {index}, object {bad} means 'no object'; with num_classes={num_classes} labels "
            f"are 0 to {num_classes - 1} (num_classes must be one more than the largest label)"
        )
    raise ValueError(f"label {label} of target {index}, object {bad} is outside 0 to {num_classes - 1}")


def _check_boxes(boxes: Tensor, index: int) -> None:
    def refuse(rows: Tensor, reason: str) -> None:
        bad = _first(rows)
        if bad is not None:
            raise ValueError(f"box {boxes[bad].tolist()} of target {index}, object {bad} {reason}")

    centre, size = boxes[:, :2], boxes[:, 2:]
    refuse(~boxes.isfinite().all(1), "is not finite")
    refuse((size < 0).any(1), "has a negative width or height")
    refuse((boxes > 1 + OUTSIDE_TOLERANCE).any(1), "is not a fraction of the image: boxes in pixels?")
    outside = torch.maximum(size / 2 - centre, centre + size / 2 - 1).amax(1)
    refuse(outside > OUTSIDE_TOLERANCE, "reaches outside the image: boxes must be cxcywh, are these xyxy?")


def _first(rows: Tensor) -> int | None:
    # Waits for the device; only called with CPU tensors.
    return int(rows.to(torch.uint8).argmax()) if bool(rows.any()) else None
