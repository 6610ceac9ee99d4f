"""JPEGs decoded at a part of their size: only where enough is left, the boxes go along, the pixels stay near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data.coco import CocoDetection
from detr_fast.data.images import load_image, load_reduced
from detr_fast.data.transforms import eval_transforms, resized_size


def photograph(path: Path, size: tuple[int, int], **options: Any) -> Path:
    """Noise of every wavelength, as photographs have it: each octave as strong as the next."""
    random = np.random.default_rng(sum(size))
    image = np.zeros((size[1], size[0], 3), dtype=np.float32)
    for octave in range(6):
        small = random.integers(0, 256, (size[1] >> octave, size[0] >> octave, 3), dtype=np.uint8)
        image += np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    Image.fromarray((image / 6).clip(0, 255).astype(np.uint8)).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("size", "shortest", "divisor"),
    [
        ((640, 480), 120, 2),
        ((640, 480), 121, 1),  # half of it would be less than twice as large
        ((640, 480), 60, 4),
        ((640, 480), 30, 8),
        ((640, 480), 5, 8),
        ((644, 484), 20, 4),  # no multiples of 8
        ((641, 480), 20, 1),
        ((480, 640), None, 1),
    ],
)
def test_the_divisor(tmp_path: Path, size: tuple[int, int], shortest: int | None, divisor: int) -> None:
    path = photograph(tmp_path / "a.jpg", size)
    image, found = load_reduced(path, shortest)
    assert found == divisor
    assert image.size == (size[0] // divisor, size[1] // divisor) and image.mode == "RGB"
    assert np.asarray(image).std() > 10


def test_other_formats_stay_whole(tmp_path: Path) -> None:
    path = photograph(tmp_path / "a.png", (640, 480))
    image, divisor = load_reduced(path, 30)
    assert (image.size, divisor) == ((640, 480), 1)


@pytest.mark.parametrize("annotated", [None, (640, 480), (480, 640)])
def test_turned_pictures(tmp_path: Path, annotated: tuple[int, int] | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = photograph(tmp_path / "a.jpg", (640, 480), exif=exif)
    image, divisor = load_reduced(path, 120, annotated_size=annotated)
    whole = load_image(path, annotated_size=annotated)
    assert divisor == 2 and image.size == (whole.width // 2, whole.height // 2)
    difference = np.asarray(image, dtype=int) - np.asarray(whole.reduce(2), dtype=int)
    assert abs(difference).mean() < 3  # and the right way up


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_pixels_after_the_resize(tmp_path: Path, divisor: int) -> None:
    """At the bound: what is left is exactly twice as large as needed."""
    path = photograph(tmp_path / "a.jpg", (1024, 768), quality=92)
    shortest = 768 // divisor // 2
    image, found = load_reduced(path, shortest)
    assert found == divisor
    wanted = resized_size((1024, 768), shortest)
    reduced, whole = (
        np.asarray(picture.resize(wanted, Image.Resampling.BILINEAR), dtype=int)
        for picture in (image, load_image(path))
    )
    error = abs(reduced - whole)
    assert whole.std() > 10
    # A box of pixels is averaged in place of a triangle of them: 24 photographs give 2.0 at most.
    assert 0 < error.mean() < 2.5 and np.quantile(error, 0.999) < 20


@pytest.mark.parametrize("masks", [False, True])
def test_targets_are_those_of_the_whole_picture(tmp_path: Path, masks: bool) -> None:
    photograph(tmp_path / "a.jpg", (640, 480))
    box = {"bbox": [100, 50, 301, 203], "segmentation": [[100, 50, 401, 50, 401, 253]], "area": 30000}
    contents = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 640, "height": 480}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, **box}],
    }
    transforms = eval_transforms(120)
    whole_image, whole = CocoDetection(tmp_path, contents, transforms, masks)[0]
    image, target = CocoDetection(tmp_path, contents, transforms, masks, shortest=120)[0]
    assert image.shape == whole_image.shape
    assert target.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(target[key], value, rtol=1e-6, atol=0)
    untransformed = CocoDetection(tmp_path, contents, None, masks, shortest=120)[0]
    assert untransformed[0].size == ((640, 480) if masks else (320, 240))
    assert untransformed[1]["orig_size"].tolist() == [480, 640]
    assert torch.equal(image, whole_image) is masks
