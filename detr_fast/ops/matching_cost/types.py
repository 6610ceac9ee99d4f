"""What ``matching_cost`` and ``matching`` take besides predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PackedTargets(NamedTuple):
    """The targets of B images one behind the other, without padding.

    Attributes:
        labels: [N] int64.
        boxes: [N, 4] float, cxcywh in [0, 1].
        num_targets: B counts, on the host, whose sum is N.
    """

    labels: Tensor
    boxes: Tensor
    num_targets: Sequence[int]

    @staticmethod
    def pack(targets: Sequence[Mapping[str, Tensor]]) -> PackedTargets:
        """From a list of dicts with "labels" [T] and "boxes" [T, 4], one an image."""
        labels = [target["labels"] for target in targets]
        return PackedTargets(torch.cat(labels), torch.cat([t["boxes"] for t in targets]), [len(x) for x in labels])


class PaddedTargets(NamedTuple):
    """The targets of B images in memory of a fixed size, so that a CUDA graph finds others there at each replay.

    What is behind the last target is padding, and is not read.

    Attributes:
        labels: [N] int64.
        boxes: [N, 4] float, cxcywh in [0, 1].
        offsets: [B + 1] int64, rising from 0 to at most N, on the labels' device: image b has the targets from
            ``offsets[b]`` to ``offsets[b + 1]``. On a GPU nobody looks at them before; kernels read nothing outside N.
        most: no image has more targets. Kernels take memory for so many, and leave further ones without a query.
    """

    labels: Tensor
    boxes: Tensor
    offsets: Tensor
    most: int

    def trimmed(self) -> PackedTargets:
        """The same without padding. Waits for the device."""
        offsets = self.offsets.tolist()  # a meant wait: only what cannot read them on the device asks for this
        counts = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
        return PackedTargets(self.labels[: offsets[-1]], self.boxes[: offsets[-1]], counts)

    def padded(self, query_of_target: Tensor) -> Tensor:
        """[L, N] of what ``matching`` gives for the trimmed targets: -1 in the padding."""
        padding = len(self.labels) - query_of_target.shape[1]
        return torch.nn.functional.pad(query_of_target, (0, padding), value=-1)


class CostWeights(NamedTuple):
    """cost = cost_class * class term + cost_bbox * L1(boxes) - cost_giou * GIoU(boxes).

    Attributes:
        cost_class, cost_bbox, cost_giou: the weights.
        focal: the class term. False: minus the class's softmax probability (DETR). True: with p the class's sigmoid,
            -alpha (1 - p)^gamma log(p + 1e-8) + (1 - alpha) p^gamma log(1 - p + 1e-8) (Deformable DETR and later).
        alpha, gamma: of the focal term.
    """

    cost_class: float = 1.0
    cost_bbox: float = 1.0
    cost_giou: float = 1.0
    focal: bool = False
    alpha: float = 0.25
    gamma: float = 2.0


def check_matching_inputs(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets | PaddedTargets,
    extra_cost: Sequence[Tensor] | None,
) -> None:
    """Raise ValueError where shapes or dtypes are not as the ops' docstrings say. Reads metadata only."""
    if len(logits) == 0 or len(logits) != len(boxes):
        raise ValueError(f"logits and boxes must be of the same L >= 1 layers, got {len(logits)} and {len(boxes)}")
    if logits[0].ndim != 3 or logits[0].shape[2] == 0:
        raise ValueError(f"logits of a layer must be [B, Q, classes], got {list(logits[0].shape)}")
    batch, queries, _ = logits[0].shape
    device = logits[0].device
    _check_layers("logits", logits, logits[0].shape, device)
    _check_layers("boxes", boxes, torch.Size((batch, queries, 4)), device)
    count = _checked_room(targets, batch) if isinstance(targets, PaddedTargets) else _checked_sum(targets, batch)
    if list(targets.labels.shape) != [count] or targets.labels.dtype != torch.int64:
        got = f"{targets.labels.dtype} {list(targets.labels.shape)}"
        raise ValueError(f"labels must be int64 [{count}], got {got}")
    if list(targets.boxes.shape) != [count, 4] or not targets.boxes.is_floating_point():
        raise ValueError(f"target boxes must be float [{count}, 4], got {list(targets.boxes.shape)}")
    for name, tensor in (("labels", targets.labels), ("target boxes", targets.boxes)):
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, where the logits are, got {tensor.device}")
    if extra_cost is not None:
        if len(extra_cost) != len(logits):
            raise ValueError(f"extra_cost must be of {len(logits)} layers, got {len(extra_cost)}")
        _check_layers("extra_cost", extra_cost, torch.Size((count, queries)), device)


def _checked_sum(targets: PackedTargets, batch: int) -> int:
    if len(targets.num_targets) != batch:
        raise ValueError(f"num_targets must have one count for each of {batch} images, got {len(targets.num_targets)}")
    if min(targets.num_targets, default=0) < 0:
        raise ValueError(f"num_targets must not be negative, got {list(targets.num_targets)}")
    return sum(targets.num_targets)


def _checked_room(targets: PaddedTargets, batch: int) -> int:
    offsets = targets.offsets
    if list(offsets.shape) != [batch + 1] or offsets.dtype != torch.int64 or offsets.device != targets.labels.device:
        got = f"{offsets.dtype} {list(offsets.shape)} on {offsets.device}"
        raise ValueError(f"offsets must be int64 [{batch + 1}] on {targets.labels.device}, got {got}")
    if targets.most < 0:
        raise ValueError(f"most must not be negative, got {targets.most}")
    return len(targets.labels)


def _check_layers(name: str, layers: Sequence[Tensor], shape: torch.Size, device: torch.device) -> None:
    for layer, tensor in enumerate(layers):
        if tensor.shape != shape or not tensor.is_floating_point():
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} of layer {layer} must be float {list(shape)}, got {got}")
        if tensor.device != device:
            raise ValueError(f"{name} of layer {layer} must be on {device}, got {tensor.device}")
