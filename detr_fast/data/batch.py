"""Images of different sizes as one padded tensor, with a mask that says where the padding is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from detr_fast.data.target_batch import TargetBatch

Target: TypeAlias = dict[str, Tensor]
Size: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class ImageBatch:
    """Images (or feature maps) in the top left corner of a common frame; the rest is padding.

    Takes the place of the original's ``NestedTensor``: it has ``tensors``, ``mask``, ``decompose`` and ``to``.

    Attributes:
        images: [B, 3, H, W] float, zero in the padding (feature maps: [B, channels, H, W]).
        mask: [B, H, W] bool, True = padding.
        sizes: B (height, width) without padding, on the host, so that nobody has to ask the device for them; they must
            be those of ``mask``. None where they are not known, or nothing is padded.
        padded: whether there is any padding; None where that is not known. Where ``sizes`` are given, they say it.
    """

    images: Tensor
    mask: Tensor
    sizes: tuple[Size, ...] | None = None
    padded: bool | None = None

    def __post_init__(self) -> None:
        batch, _, height, width = _shape_of_images(self.images)
        if self.mask.shape != (batch, height, width) or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool [{batch}, {height}, {width}], got {self.mask.dtype} {list(self.mask.shape)}"
            )
        if self.sizes is not None:
            if len(self.sizes) != batch or not all(0 <= h <= height and 0 <= w <= width for h, w in self.sizes):
                raise ValueError(f"sizes must be {batch} sizes of at most {height} x {width}, got {self.sizes}")
            padded = not all(h == height and w == width for h, w in self.sizes)
            object.__setattr__(self, "padded", padded)  # frozen

    @property
    def tensors(self) -> Tensor:
        """The original's name for ``images``."""
        return self.images

    def __len__(self) -> int:
        return len(self.images)

    def decompose(self) -> tuple[Tensor, Tensor]:
        """``(images, mask)``."""
        return self.images, self.mask

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ImageBatch:
        """The same batch on ``device``."""
        images = self.images.to(device, non_blocking=non_blocking)
        return ImageBatch(images, self.mask.to(device, non_blocking=non_blocking), self.sizes, self.padded)

    def pin_memory(self) -> ImageBatch:
        """The same batch in page-locked memory; a ``DataLoader(pin_memory=True)`` calls this."""
        return ImageBatch(self.images.pin_memory(), self.mask.pin_memory(), self.sizes, self.padded)

    @staticmethod
    def of(samples: Any) -> ImageBatch:
        """Make a batch of whatever a model was given.

        Args:
            samples: a list of [3, h, w] images of any sizes, one [B, 3, H, W] tensor without padding, an
                ``ImageBatch``, or anything with ``tensors`` and ``mask`` (the original's ``NestedTensor``).

        Raises:
            ValueError: there is no image, or a shape is not as above.
            TypeError: ``samples`` is something else.
        """
        if isinstance(samples, ImageBatch):
            return samples
        if isinstance(samples, Tensor):
            batch, _, height, width = _shape_of_images(samples)
            return ImageBatch(samples, samples.new_zeros((batch, height, width), dtype=torch.bool), padded=False)
        if hasattr(samples, "tensors") and hasattr(samples, "mask"):
            return ImageBatch(samples.tensors, samples.mask)
        if isinstance(samples, Sequence) and not isinstance(samples, str):
            return pad_images(samples)
        raise TypeError(
            f"samples must be a list of images, a tensor, an ImageBatch or a NestedTensor, got {type(samples).__name__}"
        )


def pad_images(images: Sequence[Tensor]) -> ImageBatch:
    """Put [3, h, w] images of any sizes into the smallest frame that holds them all."""
    if not images:
        raise ValueError("samples must hold at least one image, got an empty list")
    for index, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"image {index} must be a tensor [3, height, width], got {type(image).__name__}")
        if image.ndim != 3 or image.shape[0] != images[0].shape[0] or 0 in image.shape:
            expected = f"[{images[0].shape[0] if images[0].ndim == 3 else 3}, height, width]"
            raise ValueError(f"image {index} must be {expected}, got {list(image.shape)}")
    channels = images[0].shape[0]
    height, width = max(image.shape[1] for image in images), max(image.shape[2] for image in images)
    frame = images[0].new_zeros((len(images), channels, height, width))
    mask = torch.ones((len(images), height, width), dtype=torch.bool, device=frame.device)
    for image, padded, padding in zip(images, frame, mask, strict=True):
        h, w = image.shape[1:]
        padded[:, :h, :w] = image
        padding[:h, :w] = False
    sizes = tuple((image.shape[1], image.shape[2]) for image in images)
    return ImageBatch(frame, mask, sizes)


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[ImageBatch, TargetBatch]:
    """A ``DataLoader``'s ``collate_fn``: (image, target) pairs to one padded batch and the targets in one buffer."""
    images, targets = zip(*samples, strict=True)
    return pad_images(images), TargetBatch.of(targets)


def _shape_of_images(images: Tensor) -> tuple[int, int, int, int]:
    if images.ndim != 4:
        raise ValueError(f"images must be [B, channels, height, width], got {list(images.shape)}")
    if 0 in images.shape:
        raise ValueError(f"images must hold at least one image of at least one pixel, got {list(images.shape)}")
    batch, channels, height, width = images.shape
    return batch, channels, height, width
