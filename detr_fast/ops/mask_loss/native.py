"""The losses of masks and their gradients by csrc/cpu/mask_loss.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.mask_loss.reference import frame_of


def why_not(logits: Tensor) -> str | None:
    if logits.device.type != "cpu":
        return f"there is no native code for {logits.device.type} devices"
    if logits.dtype == torch.float64:
        return "the native code computes in float32, and the logits are float64"
    return _native.why_not(logits.device)


def mask_loss_native(logits: Tensor, masks: Sequence[Tensor], with_gradients: bool) -> tuple[Tensor, ...]:
    """[N] focal, [N] dice, and the gradient [N, h, w] of each mask's own losses, in float32; empty where not asked."""
    x = logits.detach().float().contiguous()
    pixels = [image.detach().contiguous() for image in masks]
    focal, dice = torch.empty(len(x)), torch.empty(len(x))
    gradients = [torch.empty(x.shape if with_gradients else 0) for _ in range(2)]
    _native.module().mask_loss_cpu(
        x.data_ptr(),
        x.shape,
        frame_of(masks),
        [(image.data_ptr(), *image.shape) for image in pixels],
        (focal.data_ptr(), dice.data_ptr()),
        tuple(gradient.data_ptr() if with_gradients else 0 for gradient in gradients),
        torch.get_num_threads(),
    )
    return focal, dice, *gradients
