"""The public op and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops._dispatch import Implementation, Op, always_runs
from detr_fast.ops.mask_argmax.native import mask_argmax_native, why_not
from detr_fast.ops.mask_argmax.reference import mask_argmax_reference
from detr_fast.ops.mask_argmax.types import Places

OP = Op(
    name="mask_argmax",
    implementations=(
        Implementation("native", mask_argmax_native, why_not),
        Implementation("reference", mask_argmax_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, device=device),),
)


def mask_argmax(masks: Tensor, rows: Places, columns: Places, *, backend: str | None = None) -> Tensor:
    """Which of several masks, upsampled, is the highest at each of some rows and columns.

    Args:
        masks: [K, h, w] float, at least one and with pixels.
        rows, columns: the places to look at, of maps of h rows and w columns.
        backend: "native" or "reference"; None takes the fastest that can run here.

    Returns:
        [rows, columns] int64 on the masks' device; of equal masks the first. A value that is no number is the highest
        in "reference", and never so in "native".

    Raises:
        ValueError: a shape or dtype is not as above, or a place lies outside.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. Nothing waits for the device.
    """
    if masks.ndim != 3 or not masks.is_floating_point() or 0 in masks.shape:
        raise ValueError(f"masks must be float [K, h, w] without a zero, got {masks.dtype} {list(masks.shape)}")
    for name, places, size in (("rows", rows, masks.shape[1]), ("columns", columns, masks.shape[2])):
        first = places.first
        inside = len(first) == 0 or (int(first.min()) >= 0 and int(first.max()) < size)
        if places.size != size or len(places.share) != len(first) or not inside:
            raise ValueError(f"{name} must be places in maps of {size} {name}, got {places}")
    return OP.choose(backend, masks).run(masks, rows, columns)
