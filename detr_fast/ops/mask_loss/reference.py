"""The losses of masks in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Lin et al. 2017, with the gamma that they found best.
ALPHA, GAMMA = 0.25, 2


def frame_of(masks: Sequence[Tensor]) -> tuple[int, int]:
    """Height and width of the smallest frame that holds the masks of all images."""
    return max(x.shape[1] for x in masks), max(x.shape[2] for x in masks)


def mask_loss_reference(logits: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    x, target = _upsampled(logits, masks), _padded(masks, logits)  # [N, H * W]
    p = x.sigmoid()
    p_of_truth = p * target + (1 - p) * (1 - target)
    alpha = ALPHA * target + (1 - ALPHA) * (1 - target)
    cross_entropy = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    focal = (alpha * (1 - p_of_truth) ** GAMMA * cross_entropy).mean(1)
    dice = 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)
    return focal, dice


def mask_loss_reference_gradients(logits: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[N, h, w] of each mask's own losses, for the compiler's node, inside which autograd does not run."""
    x, target = _upsampled(logits, masks), _padded(masks, logits)
    sign = 1 - 2 * target
    wrong = (sign * x).sigmoid()  # the probability of what is not true
    alpha = ALPHA * target + (1 - ALPHA) * (1 - target)
    cross_entropy = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    focal = sign * alpha * wrong**GAMMA * (GAMMA * (1 - wrong) * cross_entropy + wrong) / x.shape[1]
    p = x.sigmoid()
    numerator = (2 * (p * target).sum(1) + 1)[:, None]
    denominator = (p.sum(1) + target.sum(1) + 1)[:, None]
    dice = p * (1 - p) * (numerator / denominator - 2 * target) / denominator
    return _downsampled(focal, logits, masks), _downsampled(dice, logits, masks)


def _upsampled(logits: Tensor, masks: Sequence[Tensor]) -> Tensor:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))[:, None]
    return F.interpolate(x, frame_of(masks), mode="bilinear", align_corners=False).flatten(1)


def _padded(masks: Sequence[Tensor], logits: Tensor) -> Tensor:
    height, width = frame_of(masks)
    padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in masks]
    return torch.cat(padded).flatten(1).to(torch.promote_types(logits.dtype, torch.float32))


def _downsampled(gradient: Tensor, logits: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The gradient of ``_upsampled``."""
    height, width = frame_of(masks)
    size, gradient = [len(logits), 1, *logits.shape[1:]], gradient.unflatten(1, (1, height, width))
    return torch.ops.aten.upsample_bilinear2d_backward(gradient, [height, width], size, False, None, None)[:, 0]
