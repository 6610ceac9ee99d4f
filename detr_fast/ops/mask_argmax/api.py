"""The public op and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops import _triton
from detr_fast.ops._dispatch import Implementation, Op, always_runs
from detr_fast.ops.mask_argmax.native import mask_argmax_native, why_not
from detr_fast.ops.mask_argmax.reference import mask_argmax_reference
from detr_fast.ops.mask_argmax.types import Places, check_places


def _triton_forward(masks: Tensor, rows: Places, columns: Places) -> Tensor:
    from detr_fast.ops.mask_argmax.triton_impl import mask_argmax_triton  # on demand: it imports Triton

    return mask_argmax_triton(masks, rows, columns)


OP = Op(
    name="mask_argmax",
    implementations=(
        Implementation("native", mask_argmax_native, why_not),
        Implementation("triton", _triton_forward, lambda masks: _triton.why_not(masks.device)),
        Implementation("reference", mask_argmax_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, device=device),),
)


def mask_argmax(masks: Tensor, rows: Places, columns: Places, *, backend: str | None = None) -> Tensor:
    """Which of several masks, upsampled, is the highest at each of some rows and columns.

    Args:
        masks: [K, h, w] float, at least one and with pixels.
        rows, columns: the places to look at, of maps of h rows and w columns.
        backend: "native", "triton" or "reference"; None takes the fastest that can run here.

    Returns:
        [rows, columns] int64 on the masks' device; of equal masks the first. A value that is no number is the highest
        in "reference", and never so in the others.

    Raises:
        ValueError: a shape or dtype is not as above, or a place lies outside.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. Nothing waits for the device.
    """
    check_places(masks, rows, columns)
    if len(masks) == 0:
        raise ValueError("masks must be at least one, got none")
    return OP.choose(backend, masks).run(masks, rows, columns)
