"""Masks at the size of the images, sharper than the mask head's: an option with no parameters of its own.

Where a mask is uncertain, which is along its outline, half of the answer is that of the logits around the pixel, each
weighted by how near it is, how much its colour is like the pixel's, and how certain it is: joint bilateral upsampling
(Kopf et al. 2007), with certainty in the weights. It helps where the outline of an object is an edge in the image;
where it is not, as between two things of one colour, plain interpolation is better. README.md has numbers of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Standard deviations, of ImageNet's colours and of logits' distances; logits further away than REACH count for nothing.
COLOR_SPREAD, PLACE_SPREAD, REACH = 0.3, 1.0, 2
# A probability p is as certain as |2 p - 1|.
CERTAIN = 0.9
# Of the plain answer, at uncertain pixels. Without it masks of the demo are no better, and others worse.
PLAIN_SHARE = 0.5
# Masks of the images' size in memory at a time.
CHUNK = 16


def with_sharp_masks(outputs: Mapping[str, Any], images: Tensor) -> dict[str, Any]:
    """A model's outputs with ``pred_masks`` sharpened when they are asked for; ``images`` [B, 3, H, W] went in."""
    return {**outputs, "pred_masks": SharpMasks(outputs["pred_masks"], images)}


class SharpMasks:
    """Sharpened masks, computed when they are asked for, by [images, queries] as of a tensor [B, Q, H, W].

    Args:
        masks: [B, Q, h, w] logits, or the ``QueryMasks`` that computes them.
        images: [B, 3, H, W] the padded batch, normalised.
    """

    def __init__(self, masks: Any, images: Tensor) -> None:
        self.masks = masks
        self.images = images

    @property
    def shape(self) -> torch.Size:
        """[B, Q, H, W]."""
        return torch.Size((*self.masks.shape[:2], *self.images.shape[-2:]))

    def __getitem__(self, index: tuple[Tensor, Tensor]) -> Tensor:
        """The logits [K, H, W] of the queries ``index`` = (images [K], queries [K]). It waits for the device."""
        masks = self.masks[index]
        sharp = self.images.new_empty(len(masks), *self.images.shape[-2:])
        for image in range(len(self.images)):
            places = (index[0] == image).nonzero()[:, 0]
            for part in places.split(CHUNK):
                sharp[part] = sharpen_masks(masks[part], self.images[image])
        return sharp

    def dense(self) -> Tensor:
        """All of them, [B, Q, H, W]. It waits for the device."""
        batch, queries = self.shape[:2]
        numbers = torch.arange(batch * queries, device=self.images.device)
        return self[numbers // queries, numbers % queries].reshape(self.shape)


def sharpen_masks(logits: Tensor, image: Tensor) -> Tensor:
    """Upsample masks to the size of their image, each bilinearly where it is certain itself.

    Args:
        logits: [K, h, w] float.
        image: [3, H, W] float, normalised, on the same device.

    Returns:
        [K, H, W] logits.

    Raises:
        ValueError: a shape is not as above.

    Not differentiable. It waits for the device: where masks are uncertain decides what is computed.
    """
    if logits.ndim != 3 or image.ndim != 3 or len(image) != 3 or 0 in (*logits.shape[1:], *image.shape):
        shapes = f"{list(logits.shape)}, {list(image.shape)}"
        raise ValueError(f"masks and image must be [K, h, w] and [3, H, W], got {shapes}")
    logits = logits.to(image.dtype)
    if len(logits) == 0:
        return logits.new_empty(0, *image.shape[1:])
    sharp = F.interpolate(logits[None], image.shape[1:], mode="bilinear", align_corners=False)[0]
    leaning = torch.tanh(sharp / 2)  # 2 p - 1
    rows, columns = (leaning.abs() < CERTAIN).any(0).nonzero(as_tuple=True)
    ours = _lean_of_neighbours(torch.tanh(logits / 2), image, rows, columns)
    plain = leaning[:, rows, columns]
    mixed = 2 * torch.atanh((PLAIN_SHARE * plain + (1 - PLAIN_SHARE) * ours).clamp(-1 + 1e-6, 1 - 1e-6))
    sharp[:, rows, columns] = torch.where(plain.abs() < CERTAIN, mixed, sharp[:, rows, columns])
    return sharp


def _lean_of_neighbours(leaning: Tensor, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[K, P], weighted means of ``leaning`` [K, h, w] around the P pixels at ``rows`` and ``columns``."""
    height, width = leaning.shape[1:]
    colors = F.adaptive_avg_pool2d(image[None], (height, width))[0]  # [3, h, w]
    own = image[:, rows, columns]  # [3, P]
    y = (rows + 0.5) * (height / image.shape[1]) - 0.5
    x = (columns + 0.5) * (width / image.shape[2]) - 0.5
    weighted, weights = leaning.new_zeros(2, len(leaning), len(rows))
    for step in range((2 * REACH + 1) ** 2):
        i = (y.round().long() + step // (2 * REACH + 1) - REACH).clamp(0, height - 1)
        j = (x.round().long() + step % (2 * REACH + 1) - REACH).clamp(0, width - 1)
        unlike = (own - colors[:, i, j]).square().sum(0) / COLOR_SPREAD**2
        far = ((y - i).square() + (x - j).square()) / PLACE_SPREAD**2
        lean = leaning[:, i, j]
        weight = torch.exp(-(unlike + far) / 2) * lean.abs()
        weighted += weight * lean
        weights += weight
    return weighted / weights.clamp(min=1e-6)
