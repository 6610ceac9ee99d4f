"""The paper's augmentation (section A.4): the picture and everything about its objects change together.

A transform takes and returns (picture, target); the target's tensors that have one row an object stay aligned.
Random numbers come from python's ``random`` and from torch, drawn in the order of the original where there is a
choice, so a seed gives the same augmentation; worker processes need ``detr_fast.data.coco.seed_worker``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast.data.batch import Target
from detr_fast.ops.boxes import xyxy_to_cxcywh

Transform = Callable[[Any, Target], tuple[Any, Target]]

# Means and standard deviations of ImageNet's channels, with which the backbones were trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PAPER_SCALES = tuple(range(480, 801, 32))
# The tensors of a target with one row an object.
_PER_OBJECT = ("boxes", "labels", "area", "iscrowd", "masks")


def train_transforms(
    scales: Sequence[int] = PAPER_SCALES,
    max_size: int | None = 1333,
    *,
    crop_scales: Sequence[int] = (400, 500, 600),
    crop_range: tuple[int, int] = (384, 600),
    flip: float = 0.5,
    crop: float = 0.5,
) -> Compose:
    """The paper's training augmentation.

    Args:
        scales: lengths of the shortest side in pixels, drawn evenly.
        max_size: the longest side allowed; None is no limit.
        crop_scales: shortest sides before a crop.
        crop_range: smallest and largest side of a crop; a smaller picture is cropped within its own sides.
        flip, crop: probabilities of a horizontal flip and of the crop branch.
    """
    cropped = Compose((RandomResize(tuple(crop_scales)), RandomSizeCrop(*crop_range)))
    final = RandomResize(tuple(scales), max_size)
    # The original draws "no crop" below its probability.
    branch = RandomSelect(final, Compose((*cropped.transforms, final)), probability=1 - crop)
    return Compose((RandomHorizontalFlip(flip), branch, ToTensor(), Normalize()))


def eval_transforms(size: int = 800, max_size: int | None = 1333) -> Compose:
    """Shortest side ``size``, longest at most ``max_size`` pixels, normalised; nothing random."""
    return Compose((RandomResize((size,), max_size), ToTensor(), Normalize()))


def resized_size(size: tuple[int, int], shortest: int, max_size: int | None = None) -> tuple[int, int]:
    """The (width, height) of a picture whose shortest side becomes ``shortest``, rounded as in the original.

    Args:
        size: (width, height) of the picture.
        shortest: wanted length of the shortest side.
        max_size: the longest side must not exceed it, then the shortest becomes shorter.
    """
    width, height = size
    low, high = float(min(size)), float(max(size))
    if max_size is not None and high / low * shortest > max_size:
        # A picture thinner than 1 in max_size would vanish.
        shortest = max(1, int(round(max_size * low / high)))
    if min(size) == shortest:
        return size
    if width < height:
        return shortest, int(shortest * height / width)
    return int(shortest * width / height), shortest


def resize(
    image: Image.Image, target: Target, size: int | tuple[int, int], max_size: int | None = None
) -> tuple[Image.Image, Target]:
    """Scale to shortest side ``size``, or to exactly ``size`` = (width, height); bilinear with antialiasing."""
    wanted = size if isinstance(size, tuple) else resized_size(image.size, size, max_size)
    scaled = image if wanted == image.size else image.resize(wanted, Image.Resampling.BILINEAR)
    return scaled, resize_target(target, image.size, wanted)


def resize_target(target: Target, before: tuple[int, int], after: tuple[int, int]) -> Target:
    """What scaling a picture from one (width, height) to another does to its objects."""
    x_ratio, y_ratio = after[0] / before[0], after[1] / before[1]
    target = {**target, "size": torch.tensor([after[1], after[0]])}
    if "boxes" in target:
        target["boxes"] = target["boxes"] * torch.tensor([x_ratio, y_ratio, x_ratio, y_ratio])
    if "area" in target:
        target["area"] = target["area"] * (x_ratio * y_ratio)
    if "masks" in target:
        target["masks"] = _resize_masks(target["masks"], after)
    return target


def crop(image: Image.Image, target: Target, region: tuple[int, int, int, int]) -> tuple[Image.Image, Target]:
    """Cut out ``region`` = (top, left, height, width) in pixels, and drop the objects whose box vanishes.

    The area becomes the clipped mask's where there are masks, else the clipped box's. Without boxes, the objects
    whose mask vanishes are dropped.
    """
    top, left, height, width = region
    target = {**target, "size": torch.tensor([height, width])}
    if "boxes" in target:
        target["boxes"] = _crop_boxes(target["boxes"], region)
        target["area"] = (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(dim=1)
    if "masks" in target:
        target["masks"] = target["masks"][:, top : top + height, left : left + width]
        target["area"] = target["masks"].flatten(1).sum(dim=1).to(torch.float32)
    cropped = image.crop((left, top, left + width, top + height))
    return cropped, _drop_vanished(target)


def horizontal_flip(image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    """Mirror left and right."""
    width = image.size[0]
    target = dict(target)
    if "boxes" in target:
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        target["boxes"] = torch.stack((width - x1, y0, width - x0, y1), dim=1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), target


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as [3, height, width] float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)


@dataclass(frozen=True)
class Compose:
    """One transform after the other."""

    transforms: tuple[Transform, ...]

    def __call__(self, image: Any, target: Target) -> tuple[Any, Target]:
        for transform in self.transforms:
            image, target = transform(image, target)
        return image, target


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirror with ``probability``."""

    probability: float = 0.5

    def __call__(self, image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
        return horizontal_flip(image, target) if random.random() < self.probability else (image, target)


@dataclass(frozen=True)
class RandomResize:
    """Scale the shortest side to one of ``sizes`` pixels, the longest to at most ``max_size``.

    With a single size no random number is drawn, so that evaluation leaves the random state alone.
    """

    sizes: tuple[int, ...]
    max_size: int | None = None

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes must be positive lengths in pixels, at least one, got {self.sizes}")

    def __call__(self, image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
        size = random.choice(self.sizes) if len(self.sizes) > 1 else self.sizes[0]
        return resize(image, target, size, self.max_size)


@dataclass(frozen=True)
class RandomSizeCrop:
    """Cut out a rectangle with sides from ``min_size`` to ``max_size``, or less where the picture is smaller."""

    min_size: int
    max_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(f"expected 1 <= min_size <= max_size, got {self.min_size} and {self.max_size}")

    def __call__(self, image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
        width, height = (
            random.randint(min(self.min_size, side), min(self.max_size, side)) for side in (image.width, image.height)
        )
        if (width, height) == image.size:
            return crop(image, target, (0, 0, height, width))
        top = int(torch.randint(0, image.height - height + 1, (1,)))
        left = int(torch.randint(0, image.width - width + 1, (1,)))
        return crop(image, target, (top, left, height, width))


@dataclass(frozen=True)
class RandomSelect:
    """``first`` with ``probability``, else ``second``."""

    first: Transform
    second: Transform
    probability: float = 0.5

    def __call__(self, image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
        return self.first(image, target) if random.random() < self.probability else self.second(image, target)


@dataclass(frozen=True)
class ToTensor:
    """The picture becomes [3, height, width] float32 in [0, 1]."""

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        return to_tensor(image), target


@dataclass(frozen=True)
class Normalize:
    """Channels lose ``mean`` and are divided by ``std``; boxes become cxcywh as fractions of the image."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        image = (image - torch.tensor(self.mean)[:, None, None]).div_(torch.tensor(self.std)[:, None, None])
        if "boxes" not in target:
            return image, target
        height, width = image.shape[-2:]
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        return image, {**target, "boxes": xyxy_to_cxcywh(target["boxes"]) / scale}


def _resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    width, height = size
    if not len(masks):
        return masks.new_zeros((0, height, width))
    scaled = torch.nn.functional.interpolate(masks[:, None].to(torch.uint8), (height, width), mode="nearest")
    return scaled[:, 0].to(torch.bool)


def _crop_boxes(boxes_xyxy_px: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    top, left, height, width = region
    shifted = boxes_xyxy_px - torch.tensor([left, top, left, top])
    limit = torch.tensor([width, height, width, height], dtype=shifted.dtype)
    return torch.minimum(shifted, limit).clamp(min=0)


def _drop_vanished(target: Target) -> Target:
    if "boxes" in target:
        keep = (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(dim=1)
    elif "masks" in target:
        keep = target["masks"].flatten(1).any(dim=1)
    else:
        return target
    return {key: value[keep] if key in _PER_OBJECT else value for key, value in target.items()}
