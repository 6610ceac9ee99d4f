"""The public op and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops import _triton
from detr_fast.ops._dispatch import Implementation, Op, always_runs
from detr_fast.ops.mask_argmax.native import why_not
from detr_fast.ops.mask_argmax.types import Places, check_places
from detr_fast.ops.mask_threshold.native import mask_threshold_native
from detr_fast.ops.mask_threshold.reference import mask_threshold_reference


def _triton_forward(masks: Tensor, rows: Places, columns: Places, bound: float) -> Tensor:
    from detr_fast.ops.mask_argmax.triton_impl import mask_threshold_triton  # on demand: it imports Triton

    return mask_threshold_triton(masks, rows, columns, bound)


OP = Op(
    name="mask_threshold",
    implementations=(
        Implementation("native", mask_threshold_native, why_not),
        Implementation("triton", _triton_forward, lambda masks: _triton.why_not(masks.device)),
        Implementation("reference", mask_threshold_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, device=device),),
)


def mask_threshold(
    masks: Tensor, rows: Places, columns: Places, bound: float = 0.0, *, backend: str | None = None
) -> Tensor:
    """Where masks, upsampled, are above a bound, at some rows and columns.

    Args:
        masks: [K, h, w] float with pixels; K may be 0.
        rows, columns: the places to look at, of maps of h rows and w columns.
        bound: of a logit, that of probability one half is 0.
        backend: "native", "triton" or "reference"; None takes the fastest that can run here.

    Returns:
        [K, rows, columns] uint8 on the masks' device, 1 where the value is higher; 0 where it is no number.

    Raises:
        ValueError: a shape or dtype is not as above, or a place lies outside.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. The upsampled masks are not stored, but by "reference". Nothing waits for the device.
    """
    check_places(masks, rows, columns)
    return OP.choose(backend, masks).run(masks, rows, columns, bound)
