"""The paper's augmentation: sizes as the original's, and boxes, areas and masks that follow the picture."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from detr_fast.data.coco import CocoDetection
from detr_fast.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Compose,
    Normalize,
    RandomResize,
    RandomSizeCrop,
    crop,
    eval_transforms,
    horizontal_flip,
    resize,
    resized_size,
    to_tensor,
    train_transforms,
)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.randint(0, 256, (height, width, 3), dtype=np.uint8))


def boxed_target(width: int, height: int, boxes_xyxy_px: list[list[int]]) -> dict[str, Tensor]:
    """Objects that fill their boxes; object i has label i."""
    masks = torch.zeros(len(boxes_xyxy_px), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes_xyxy_px, strict=True):
        mask[y0:y1, x0:x1] = True
    return {
        "boxes": torch.tensor(boxes_xyxy_px, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(len(boxes_xyxy_px)),
        "area": masks.flatten(1).sum(1).float(),
        "iscrowd": torch.zeros(len(boxes_xyxy_px), dtype=torch.int64),
        "masks": masks,
        "image_id": torch.tensor([5]),
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor([height, width]),
    }


def mask_boxes(masks: Tensor) -> Tensor:
    corners = []
    for mask in masks:
        y, x = mask.nonzero().unbind(1)
        corners.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


# (width, height), shortest side, longest side allowed, and the (width, height) that torchvision's and the original's
# arithmetic give.
SIZES = [
    ((640, 480), 800, 1333, (1066, 800)),
    ((480, 640), 800, 1333, (800, 1066)),
    ((640, 427), 800, 1333, (1199, 800)),
    ((640, 360), 800, 1333, (1333, 750)),
    ((500, 375), 480, 1333, (640, 480)),
    ((640, 190), 608, 1333, (1333, 396)),
    ((1000, 800), 800, 1333, (1000, 800)),
    ((800, 800), 800, None, (800, 800)),
    ((333, 97), 400, None, (1373, 400)),
    ((5000, 1), 800, 1333, (5000, 1)),
]


@pytest.mark.parametrize(("size", "shortest", "max_size", "expected"), SIZES)
def test_resized_size(size: tuple[int, int], shortest: int, max_size: int | None, expected: tuple[int, int]) -> None:
    assert resized_size(size, shortest, max_size) == expected


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 900))
def test_resized_size_keeps_the_aspect(width: int, height: int, shortest: int) -> None:
    new_width, new_height = resized_size((width, height), shortest)
    assert min(new_width, new_height) == shortest
    assert max(new_width, new_height) == pytest.approx(shortest * max(width, height) / min(width, height), abs=1)


def test_preprocessing_known_answers(shared_data: Path, known_answers: dict) -> None:
    expected = known_answers["hf_detr_preprocess_39769"]
    contents = json.loads((shared_data / "fixtures" / "hf_39769" / "coco_annotations_boxes.json").read_text())
    annotations = [entry | {"image_id": 39769} for entry in contents["annotations"]]
    categories = [{"id": entry["category_id"]} for entry in {e["category_id"]: e for e in annotations}.values()]
    images = [{"id": 39769, "file_name": "absent.jpg"}]
    dataset = CocoDetection(".", {"images": images, "annotations": annotations, "categories": categories})
    height, width = expected["orig_size"]
    image, target = eval_transforms()(Image.new("RGB", (width, height)), dataset.target(0, (width, height)))
    assert list(image.shape[1:]) == target["size"].tolist() == expected["size"]
    assert target["orig_size"].tolist() == expected["orig_size"]
    assert target["area"].tolist() == pytest.approx(expected["detection"]["area"], rel=1e-6)
    assert target["boxes"][0].tolist() == pytest.approx(expected["detection"]["boxes_0_cxcywh"], abs=6e-5)


def test_resize_scales_everything() -> None:
    image, target = resize(noise(40, 20), boxed_target(40, 20, [[4, 2, 20, 10], [0, 0, 40, 20]]), 40)
    assert image.size == (80, 40)
    assert target["boxes"].tolist() == [[8, 4, 40, 20], [0, 0, 80, 40]]
    assert target["area"].tolist() == [16 * 8 * 4, 40 * 20 * 4]
    assert target["masks"].dtype == torch.bool
    assert mask_boxes(target["masks"]).equal(target["boxes"])
    assert target["size"].tolist() == [40, 80]
    assert target["orig_size"].tolist() == [20, 40]


def test_resize_to_exact_size() -> None:
    image, target = resize(noise(10, 10), boxed_target(10, 10, [[0, 0, 5, 5]]), (20, 40))
    assert image.size == (20, 40)
    assert target["boxes"].tolist() == [[0, 0, 10, 20]]


def test_resize_is_pillows_antialiased_bilinear() -> None:
    image = noise(64, 48)
    small = np.asarray(resize(image, {}, 12)[0])
    assert np.array_equal(small, np.asarray(image.resize((16, 12), Image.Resampling.BILINEAR)))
    # Averaging over 4 x 4 pixels of noise leaves far less spread than picking pixels does.
    assert small.std() < np.asarray(image).std() / 2


def test_flip_mirrors_everything() -> None:
    image, target = noise(40, 20), boxed_target(40, 20, [[4, 2, 20, 10]])
    flipped, mirrored = horizontal_flip(image, target)
    assert mirrored["boxes"].tolist() == [[20, 2, 36, 10]]
    assert mask_boxes(mirrored["masks"]).equal(mirrored["boxes"])
    assert flipped.getpixel((0, 3)) == image.getpixel((39, 3))
    again, twice = horizontal_flip(flipped, mirrored)
    assert np.array_equal(np.asarray(again), np.asarray(image))
    assert twice["boxes"].equal(target["boxes"])


def test_crop_drops_vanished_objects_from_every_field() -> None:
    boxes = [[0, 0, 10, 10], [5, 5, 30, 15], [20, 10, 40, 20], [12, 6, 14, 8]]
    image, target = crop(noise(40, 20), boxed_target(40, 20, boxes), (4, 10, 8, 10))
    assert image.size == (10, 8)
    # The first ends where the crop begins, the third starts where it ends.
    assert target["labels"].tolist() == [1, 3]
    assert target["boxes"].tolist() == [[0, 1, 10, 8], [2, 2, 4, 4]]
    assert target["area"].tolist() == [70, 4]
    assert target["iscrowd"].shape == (2,)
    assert mask_boxes(target["masks"]).equal(target["boxes"])
    assert target["size"].tolist() == [8, 10]
    assert target["image_id"].tolist() == [5]


def test_crop_takes_the_masks_area() -> None:
    target = boxed_target(40, 20, [[0, 0, 20, 20]])
    target["masks"][0, :, ::2] = False
    assert crop(noise(40, 20), target, (0, 0, 10, 10))[1]["area"].tolist() == [50]
    del target["masks"]
    assert crop(noise(40, 20), target, (0, 0, 10, 10))[1]["area"].tolist() == [100]


def test_crop_of_masks_without_boxes() -> None:
    target = boxed_target(40, 20, [[0, 0, 10, 10], [30, 10, 40, 20]])
    del target["boxes"]
    assert crop(noise(40, 20), target, (0, 0, 8, 8))[1]["labels"].tolist() == [0]


def test_objectless_targets_pass_through_everything() -> None:
    image, target = train_transforms(crop=1.0)(noise(50, 60), boxed_target(50, 60, []))
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, *image.shape[1:])
    assert target["labels"].shape == target["area"].shape == (0,)


def test_to_tensor_and_normalize() -> None:
    image = noise(7, 5)
    tensor, target = Normalize()(to_tensor(image), boxed_target(7, 5, [[0, 0, 7, 5], [1, 2, 3, 3]]))
    pixels = np.asarray(image).astype(np.float64).transpose(2, 0, 1) / 255
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert tensor.dtype == torch.float32
    assert torch.from_numpy((pixels - mean) / std).allclose(tensor.double(), atol=1e-6)
    assert target["boxes"].allclose(torch.tensor([[0.5, 0.5, 1, 1], [2 / 7, 0.5, 2 / 7, 0.2]]))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (37, 53), (383, 384), (700, 701)])
def test_pictures_smaller_than_the_crop(size: tuple[int, int]) -> None:
    width, height = size
    image, target = RandomSizeCrop(384, 600)(noise(width, height), boxed_target(width, height, [[0, 0, width, height]]))
    assert all(min(384, side) <= new <= min(600, side) for new, side in zip(image.size, size, strict=True))
    assert target["boxes"].tolist() == [[0, 0, *image.size]]


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (37, 53)])
def test_tiny_pictures_pass_the_whole_augmentation(size: tuple[int, int]) -> None:
    augment = train_transforms([24, 32], 64, crop_scales=[16], crop_range=(20, 30), crop=1.0)
    for _ in range(5):
        image, target = augment(noise(*size), boxed_target(*size, [[0, 0, *size]]))
        assert list(image.shape[1:]) == target["size"].tolist()
        assert target["boxes"].shape == (1, 4)


def test_objects_follow_the_whole_augmentation() -> None:
    """A white square on black: wherever the augmentation moves it, box, mask, area and pixels agree."""
    augment = train_transforms([64, 80], 120, crop_scales=[56], crop_range=(30, 50))
    kept = 0
    for _ in range(40):
        pixels = np.zeros((60, 80, 3), dtype=np.uint8)
        pixels[20:44, 30:60] = 255
        image, target = augment(Image.fromarray(pixels), boxed_target(80, 60, [[30, 20, 60, 44]]))
        height, width = image.shape[1:]
        white = (image[0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]) > 0.5
        if not len(target["boxes"]):
            assert not white.any()
            continue
        kept += 1
        cx, cy, w, h = (target["boxes"][0] * torch.tensor([width, height, width, height])).tolist()
        seen = mask_boxes(white[None])[0]
        assert seen.tolist() == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], abs=2)
        assert mask_boxes(target["masks"])[0].allclose(seen, atol=4)
        assert float(target["area"]) == pytest.approx(w * h, rel=0.25)
    assert kept > 20


def test_seed_repeats_the_augmentation() -> None:
    picture, target = noise(90, 70), boxed_target(90, 70, [[10, 10, 60, 60]])
    augment = train_transforms([32, 48, 64], 100, crop_scales=[50], crop_range=(20, 40))

    def draw(seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        random.seed(seed)
        torch.manual_seed(seed)
        return [augment(picture, target) for _ in range(6)]

    first, again = draw(3), draw(3)
    assert all(a[0].equal(b[0]) and a[1]["boxes"].equal(b[1]["boxes"]) for a, b in zip(first, again, strict=True))
    assert len({tuple(image.shape) for image, _ in first}) > 1


def test_evaluation_leaves_the_random_state_alone() -> None:
    picture, target = noise(90, 70), boxed_target(90, 70, [[10, 10, 60, 60]])
    before = random.getstate(), torch.get_rng_state()
    eval_transforms(32)(picture, target)
    assert random.getstate() == before[0]
    assert torch.get_rng_state().equal(before[1])
    RandomResize((32, 48))(picture, target)
    assert random.getstate() != before[0]


def test_paper_settings() -> None:
    augment = train_transforms()
    assert augment.transforms[1].first == RandomResize((480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800), 1333)
    assert augment.transforms[1].second.transforms[:2] == (RandomResize((400, 500, 600)), RandomSizeCrop(384, 600))
    assert eval_transforms().transforms[0] == RandomResize((800,), 1333)


def test_transforms_travel_to_worker_processes() -> None:
    augment = train_transforms()
    assert pickle.loads(pickle.dumps(augment)) == augment
    assert isinstance(augment, Compose)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="sizes must be positive lengths"):
        train_transforms([])
    with pytest.raises(ValueError, match="sizes must be positive lengths"):
        eval_transforms(0)
    with pytest.raises(ValueError, match="expected 1 <= min_size <= max_size, got 5 and 4"):
        RandomSizeCrop(5, 4)
