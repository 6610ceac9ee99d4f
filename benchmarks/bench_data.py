"""A training batch from JPEG files to one padded tensor, in one process: what a worker does while the model trains.

``original`` decodes each picture whole, in the original's steps; augmentation is the resize alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import Contest, Contestant
from benchmarks.shapes import PHOTOGRAPHS, PhotographShape
from detr_fast.data.batch import collate
from detr_fast.data.coco import CocoDetection
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, eval_transforms, resized_size

Race = Callable[[str, str, Callable[[], Contest]], None]


@pytest.mark.parametrize("contestant", ["original", "detr_fast"])
@pytest.mark.parametrize("shape", PHOTOGRAPHS, ids=lambda shape: shape.name)
def test_data(race: Race, shape: PhotographShape, contestant: str) -> None:
    race(f"data {shape.name}", contestant, lambda: contest(shape))


def contest(shape: PhotographShape) -> Contest:
    """Both ways; pixels may differ as ``load_reduced`` says."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "photograph.jpg"
    photograph(shape.size).save(path, quality=92)
    images = [{"id": number, "file_name": path.name} for number in range(shape.batch)]
    contents = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    dataset = CocoDetection(
        path.parent, contents, eval_transforms(shape.shortest, shape.longest), shortest=shape.shortest
    )

    def ours() -> Tensor:
        return collate([dataset[number] for number in range(shape.batch)])[0].images

    def original(kept: tempfile.TemporaryDirectory[str] = folder) -> Tensor:
        return original_batch([path] * shape.batch, shape)

    expected = original()

    def check(batch: Tensor) -> None:
        assert batch.shape == expected.shape
        error = (batch - expected).abs().mean() * 255 * min(IMAGENET_STD)
        assert error < 2.5, f"pixels differ by {error} of 255 on average"

    # Pillow takes its memory from the system.
    ways = {"original": original, "detr_fast": ours}
    return Contest([Contestant(name, way, counts_memory=False) for name, way in ways.items()], check)


def photograph(size: tuple[int, int]) -> Image.Image:
    """Noise of every wavelength, each octave as strong as the next."""
    random, total = np.random.default_rng(0), np.zeros((size[1], size[0], 3), np.float32)
    for octave in range(6):
        small = random.integers(0, 256, (size[1] >> octave, size[0] >> octave, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((total / 6).clip(0, 255).astype(np.uint8))


def original_batch(paths: list[Path], shape: PhotographShape) -> Tensor:
    """Decode, resize, to a tensor, normalise, pad."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    tensors = []
    for path in paths:
        picture = Image.open(path).convert("RGB")
        picture = picture.resize(resized_size(picture.size, shape.shortest, shape.longest), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
        tensors.append(pixels.sub(mean).div(std))
    height, width = (max(side) for side in zip(*(tensor.shape[1:] for tensor in tensors), strict=True))
    batch = torch.zeros(len(tensors), 3, height, width)
    for frame, tensor in zip(batch, tensors, strict=True):
        frame[:, : tensor.shape[1], : tensor.shape[2]].copy_(tensor)
    return batch
