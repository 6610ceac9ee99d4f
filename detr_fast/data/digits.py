"""Scenes of real handwritten digits on real photographs, made from what scikit-learn's wheel contains.

The digits are the 1797 of `sklearn.datasets.load_digits` (8x8, 17 grey levels), the photographs the two of
`load_sample_images`. Training and validation scenes share neither: every fifth digit and the right part of both
photographs are kept for validation. Category ids are 1..10, the names "0".."9".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD

SPLITS = ("train", "val")
CATEGORIES = {digit + 1: str(digit) for digit in range(10)}

# Every fifth digit, and the photographs right of this share of their width, are seen in validation only.
_VAL_EVERY = 5
_TRAIN_WIDTH = 0.68
_PHOTO_SCALES = (0.5, 0.7, 1.0)
# Ink lighter than this share of full alpha cannot be made out, so it is left away and boxes stay tight.
_VISIBLE = 0.15
_PLACEMENT_TRIES = 12
# Normalisation as one multiplication and one addition of 0..255 values, [3, 1, 1].
_SCALE = (1 / (255 * np.array(IMAGENET_STD))).astype(np.float32)[:, None, None]
_SHIFT = (-np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD)).astype(np.float32)[:, None, None]


@dataclass(frozen=True)
class Scene:
    """One picture and what is in it, T digits.

    Attributes:
        image: [H, W, 3] uint8 RGB.
        labels: [T] int64 category ids.
        boxes_xyxy_px: [T, 4] float32; the smallest box around each mask, right and bottom edge exclusive.
        masks: [T, H, W] bool, disjoint.
        digits: [T] int64, the digit's number in `load_digits`.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes_xyxy_px: np.ndarray
    masks: np.ndarray
    digits: np.ndarray


class DigitScenes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """An endless supply of scenes: item ``i`` is drawn from ``(seed, i)`` alone, whenever it is asked for.

    Items are ``(image [3, H, W] normalised as for ImageNet, target)`` with the keys of a COCO target.

    Args:
        split: "train" or "val"; they share no digit and no part of a photograph.
        length: how many items there are.
        size: height and width of the pictures in pixels, 48..192.
        max_digits: a scene holds 1..max_digits digits.
        seed: other seeds give other scenes.
        return_masks: targets carry "masks" [T, H, W].
    """

    categories = CATEGORIES
    num_classes = max(CATEGORIES) + 1

    def __init__(
        self,
        split: str,
        length: int,
        *,
        size: int = 96,
        max_digits: int = 5,
        seed: int = 0,
        return_masks: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if not 48 <= size <= 192:
            raise ValueError(f"size must be in 48..192 pixels, got {size}")
        if length < 1 or max_digits < 1:
            raise ValueError(f"length and max_digits must be at least 1, got {length} and {max_digits}")
        self.split, self.length, self.size = split, length, size
        self.max_digits, self.seed, self.return_masks = max_digits, seed, return_masks
        self._glyphs, self._digit_labels, self._digit_numbers = _digits(split)
        self._photos = _photos(split)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in 0..{self.length - 1}, got {index}")
        return scene_to_sample(self.scene(index), index, return_masks=self.return_masks)

    def scene(self, index: int) -> Scene:
        """Draw scene ``index``; the same call always gives the same scene."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        canvas = self._background(rng)
        taken = np.zeros(canvas.shape[:2], dtype=bool)
        placed: list[tuple[int, np.ndarray, np.ndarray]] = []
        for _ in range(rng.integers(1, self.max_digits + 1)):
            digit = int(rng.integers(len(self._glyphs)))
            alpha = _render_ink(self._glyphs[digit], self._digit_height(rng), rng)
            box = _find_room(alpha, taken, [box for _, box, _ in placed], rng)
            if box is not None:
                placed.append((digit, box, _paint(canvas, taken, alpha, box, rng)))
        return self._scene(canvas, placed)

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        photo = self._photos[rng.integers(len(self._photos))]
        top = rng.integers(photo.shape[0] - self.size + 1)
        left = rng.integers(photo.shape[1] - self.size + 1)
        crop = photo[top : top + self.size, left : left + self.size]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return crop * np.float32(rng.uniform(0.6, 1.1))

    def _digit_height(self, rng: np.random.Generator) -> int:
        return round(self.size * math.exp(rng.uniform(math.log(0.2), math.log(0.5))))

    def _scene(self, canvas: np.ndarray, placed: list[tuple[int, np.ndarray, np.ndarray]]) -> Scene:
        digits = np.array([digit for digit, _, _ in placed], dtype=np.int64)
        return Scene(
            image=np.clip(canvas + 0.5, 0, 255.5, out=canvas).astype(np.uint8),
            labels=self._digit_labels[digits] + 1,
            boxes_xyxy_px=np.array([box for _, box, _ in placed], dtype=np.float32).reshape(-1, 4),
            masks=np.array([mask for _, _, mask in placed], dtype=bool).reshape(-1, *canvas.shape[:2]),
            digits=self._digit_numbers[digits],
        )


class FreshScenes(Sampler[int]):
    """Scenes that no epoch before had: epoch ``e`` gets the numbers from ``e * length`` on."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length, (self.epoch + 1) * self.length))


def scene_to_sample(scene: Scene, image_id: int, *, return_masks: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn a scene into what `CocoDetection` with its evaluation transforms gives: normalised image, target."""
    height, width = scene.image.shape[:2]
    pixels = np.ascontiguousarray(scene.image.transpose(2, 0, 1)) * _SCALE + _SHIFT  # [3, H, W]
    left, top, right, bottom = scene.boxes_xyxy_px.T / np.array([[width], [height], [width], [height]], np.float32)
    boxes = np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], axis=-1)  # [T, 4]
    target = {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.from_numpy(scene.labels),
        "image_id": torch.tensor([image_id]),
        "area": torch.from_numpy(scene.masks.sum((1, 2)).astype(np.float32)),
        "iscrowd": torch.zeros(len(scene.labels), dtype=torch.int64),
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor([height, width]),
    }
    if return_masks:
        target["masks"] = torch.from_numpy(scene.masks)
    return torch.from_numpy(pixels), target


def write_coco(scenes: Sequence[Scene], folder: Path | str, split: str = "val") -> tuple[Path, Path]:
    """Write scenes as a COCO-format data set: ``folder/images/000000.png`` ... and ``folder/instances_<split>.json``.

    Image ids are the scenes' numbers; masks are uncompressed run lengths.

    Returns:
        The image folder and the annotation file.
    """
    image_folder = Path(folder) / "images"
    image_folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for image_id, scene in enumerate(scenes):
        file_name = f"{image_id:06d}.png"
        Image.fromarray(scene.image).save(image_folder / file_name)
        height, width = scene.image.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        annotations += _annotations(scene, image_id, first_id=len(annotations) + 1)
    categories = [{"id": i, "name": name, "supercategory": "digit"} for i, name in CATEGORIES.items()]
    annotation_file = Path(folder) / f"instances_{split}.json"
    contents = {"images": images, "annotations": annotations, "categories": categories}
    annotation_file.write_text(json.dumps(contents), encoding="utf-8")
    return image_folder, annotation_file


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Encode a [H, W] bool mask as COCO's uncompressed run lengths: column by column, the first run is zeros."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def _annotations(scene: Scene, image_id: int, *, first_id: int) -> list[dict[str, object]]:
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": int(label),
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": run_lengths(mask),
        }
        for i, (label, (x0, y0, x1, y1), mask) in enumerate(
            zip(scene.labels, scene.boxes_xyxy_px, scene.masks, strict=True)
        )
    ]


@cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The split's digits: ink in [0, 1] with an empty rim, [N, 10, 10]; value 0..9, [N]; number, [N]."""
    digits = _sklearn_datasets().load_digits()
    numbers = np.arange(len(digits.target))
    numbers = numbers[(numbers % _VAL_EVERY == 0) == (split == "val")]
    glyphs = np.pad(digits.images[numbers].astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
    return glyphs, digits.target[numbers].astype(np.int64), numbers


@cache
def _photos(split: str) -> list[np.ndarray]:
    """The split's side of both photographs at a few scales, each [H, W, 3] float32 in 0..255, at least 192 px."""
    photos = []
    for photo in _sklearn_datasets().load_sample_images().images:
        cut = int(photo.shape[1] * _TRAIN_WIDTH)
        side = Image.fromarray(photo[:, cut:] if split == "val" else photo[:, :cut])
        for scale in _PHOTO_SCALES:
            scale = max(scale, 192 / min(side.size))
            small = side.resize((round(side.width * scale), round(side.height * scale)), Image.Resampling.LANCZOS)
            photos.append(np.asarray(small, dtype=np.float32))
    return photos


def _sklearn_datasets() -> ModuleType:
    try:
        from sklearn import datasets  # takes a second to import
    except ImportError as error:
        raise ModuleNotFoundError(
            "the digits and photographs are scikit-learn's, which is not installed: pip install scikit-learn"
        ) from error
    return datasets


def _render_ink(glyph: np.ndarray, height: int, rng: np.random.Generator) -> np.ndarray:
    """Scale, turn and slant one 10x10 glyph; returns its alpha, [h, w] float32, cut to the visible ink."""
    angle, slant = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
    zoom_y = 8 / height
    zoom_x = zoom_y * rng.uniform(0.85, 1.15)
    cos, sin = math.cos(angle), math.sin(angle)
    # Where each picture point is read from, about the centres of both; 1.4 leaves room for the corners.
    side = round(height * 1.4)
    ax, bx = zoom_x * cos, zoom_x * (slant - sin)
    ay, by = zoom_y * sin, zoom_y * cos
    centre = side / 2
    coefficients = (ax, bx, 5 - centre * (ax + bx), ay, by, 5 - centre * (ay + by))
    values = np.asarray(
        Image.fromarray(glyph).transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    )
    alpha = np.clip(values * 2.5 - 0.6, 0, 1)
    visible = alpha >= _VISIBLE
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    return np.where(visible, alpha, 0)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _find_room(
    alpha: np.ndarray, taken: np.ndarray, boxes: list[np.ndarray], rng: np.random.Generator
) -> np.ndarray | None:
    """A random box [4] int64 xyxy in which no ink meets ink and boxes hardly overlap, or None after some tries."""
    (height, width), (canvas_height, canvas_width) = alpha.shape, taken.shape
    if height > canvas_height or width > canvas_width:
        return None
    for _ in range(_PLACEMENT_TRIES):
        x0 = int(rng.integers(canvas_width - width + 1))
        y0 = int(rng.integers(canvas_height - height + 1))
        box = np.array([x0, y0, x0 + width, y0 + height])
        if any(_overlap_share(box, other) > 0.1 for other in boxes):
            continue
        if not (taken[y0 : y0 + height, x0 : x0 + width] & (alpha > 0)).any():
            return box
    return None


def _overlap_share(a: np.ndarray, b: np.ndarray) -> float:
    """The two boxes' intersection as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _paint(
    canvas: np.ndarray, taken: np.ndarray, alpha: np.ndarray, box: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Paint ink onto ``canvas`` (RGB 0..255, in place) in a colour that shows there; returns its mask [H, W]."""
    x0, y0, x1, y1 = box
    patch = canvas[y0:y1, x0:x1]
    colour = rng.uniform(0, 90, 3) if patch.mean() > 115 else rng.uniform(165, 255, 3)
    patch += alpha[..., None] * (colour.astype(np.float32) - patch)
    mask = np.zeros_like(taken)
    mask[y0:y1, x0:x1] = alpha > 0
    taken |= mask
    return mask
