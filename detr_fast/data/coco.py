"""COCO-format detection data as the targets that DETR trains on."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from detr_fast.data.annotations import AnnotationError, entry_name, name_of, read_annotations
from detr_fast.data.batch import Target
from detr_fast.data.images import load_reduced
from detr_fast.data.transforms import resize_target

Transform = Callable[[Image.Image, Target], tuple[Any, Target]]


class CocoDetection(Dataset[tuple[Any, Target]]):
    """Images with their objects, in the order of the image ids.

    A target is a dictionary of tensors, for T objects:

    - "boxes": [T, 4] float32 xyxy in pixels, clipped to the image (the last transform makes them cxcywh in [0, 1]);
    - "labels": [T] int64 category ids; "area": [T] float32 square pixels; "iscrowd": [T] int64, all 0;
    - "masks": [T, height, width] bool, where ``return_masks`` asks for them;
    - "image_id": [1] int64; "orig_size" and "size": [2] int64 (height, width) of the file and of what is returned.

    Crowd regions and boxes without area inside the image are left out. Images without objects stay in. Boxes are
    taken to be in pixels of the file; `detr-fast check-data` reports files of another size than the annotations say.

    Args:
        image_folder: what the file names of the annotations are relative to.
        annotation_file: path of a COCO JSON file, or its contents.
        transforms: called with (RGB picture, target); None returns the picture itself.
        return_masks: decode polygons and run-length encodings to masks.
        shortest: the shortest side in pixels that ``transforms`` need at most: large JPEGs are decoded at a part of
            their size then (see ``load_reduced``), and picture and boxes arrive so; "orig_size" stays the file's. With
            masks it has no effect.

    Raises:
        AnnotationError: the annotations are unusable; the message names file, entry and key.
        ImageError: on access, the image is missing or damaged; the message names it.
    """

    def __init__(
        self,
        image_folder: str | os.PathLike[str],
        annotation_file: str | os.PathLike[str] | dict[str, Any],
        transforms: Transform | None = None,
        return_masks: bool = False,
        shortest: int | None = None,
    ) -> None:
        self.image_folder = Path(image_folder)
        self.annotation_file = annotation_file
        self.transforms = transforms
        self.return_masks = return_masks
        self.shortest = None if return_masks else shortest
        contents = read_annotations(annotation_file)
        self.categories = category_names(contents)
        images = sorted(contents["images"], key=lambda image: image["id"])
        self.image_ids: list[int] = [int(image["id"]) for image in images]
        self._file_names = [image["file_name"] for image in images]
        self._sizes = [_annotated_size(image) for image in images]
        self._store_objects(contents["annotations"])

    @property
    def is_thing_map(self) -> dict[int, bool]:
        """Category id to whether it is a thing: instances are all things."""
        return dict.fromkeys(self.categories, True)

    @property
    def num_classes(self) -> int:
        """The highest category id + 1: ids may have gaps, and each is its own class."""
        return max(self.categories, default=-1) + 1

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        path, annotated = self.image_path(index), self._sizes[index]
        image, divisor = load_reduced(path, self.shortest, annotated_size=annotated)
        whole = (divisor * image.width, divisor * image.height)
        target = self.target(index, whole)
        if divisor > 1:
            target = resize_target(target, whole, image.size)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def image_path(self, index: int) -> Path:
        """The file of image ``index``."""
        return self.image_folder / self._file_names[index]

    def target(self, index: int, size: tuple[int, int]) -> Target:
        """The untransformed target of image ``index``, whose (width, height) is ``size``."""
        width, height = size
        chosen = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        boxes_xyxy_px = _clipped_corners(self._boxes_xywh_px[chosen], width, height)
        keep = (boxes_xyxy_px[:, 2:] > boxes_xyxy_px[:, :2]).all(dim=1)
        target = {
            "boxes": boxes_xyxy_px[keep],
            "labels": torch.from_numpy(self._labels[chosen])[keep],
            "area": torch.from_numpy(self._areas[chosen])[keep],
            "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
            "image_id": torch.tensor([self.image_ids[index]]),
            "orig_size": torch.tensor([height, width]),
            "size": torch.tensor([height, width]),
        }
        if self.return_masks:
            target["masks"] = self._masks(chosen, width, height)[keep]
        return target

    def _store_objects(self, annotations: Sequence[dict[str, Any]]) -> None:
        # Arrays sorted by image instead of a list of dictionaries: a tenth of the memory, and worker processes share
        # it, where counting references to a million small objects would copy every page that holds one.
        position = {number: index for index, number in enumerate(self.image_ids)}
        kept = [index for index, entry in enumerate(annotations) if not entry.get("iscrowd", 0)]
        images = np.array([position[annotations[index]["image_id"]] for index in kept], dtype=np.int64)
        order = np.argsort(images, kind="stable")
        objects = [annotations[kept[index]] for index in order]
        self._offsets = np.searchsorted(images[order], np.arange(len(self.image_ids) + 1))
        self._boxes_xywh_px = np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(-1, 4)
        self._labels = np.array([entry["category_id"] for entry in objects], dtype=np.int64)
        box_areas = self._boxes_xywh_px[:, 2] * self._boxes_xywh_px[:, 3]
        areas = [entry.get("area", box_area) for entry, box_area in zip(objects, box_areas, strict=True)]
        self._areas = np.array(areas, dtype=np.float32)
        if self.return_masks:
            self._entries = [entry_name("annotations", kept[i], annotations[kept[i]]) for i in order]
            self._segmentations = [entry.get("segmentation") for entry in objects]
            self._check_segmentations()

    def _check_segmentations(self) -> None:
        for entry, segmentation in zip(self._entries, self._segmentations, strict=True):
            if not segmentation:
                raise AnnotationError(
                    f"{name_of(self.annotation_file)}: {entry}: masks need the key 'segmentation' with polygons or a "
                    f"run-length encoding, got {segmentation!r}"
                )

    def _masks(self, chosen: slice, width: int, height: int) -> Tensor:
        masks = np.zeros((chosen.stop - chosen.start, height, width), dtype=np.bool_)
        for mask, index in zip(masks, range(chosen.start, chosen.stop), strict=True):
            try:
                mask[:] = decode_segmentation(self._segmentations[index], width, height)
            except (ValueError, TypeError, KeyError) as error:
                source = name_of(self.annotation_file)
                raise AnnotationError(f"{source}: {self._entries[index]}: bad 'segmentation': {error}") from error
        return torch.from_numpy(masks)


def category_names(contents: dict[str, Any]) -> dict[int, str]:
    """{category id: name} in the order of the ids; a category without a name is called by its id."""
    categories = sorted(contents["categories"], key=lambda category: category["id"])
    return {int(category["id"]): str(category.get("name", category["id"])) for category in categories}


def decode_segmentation(segmentation: Any, width: int, height: int) -> np.ndarray:
    """A COCO segmentation as a [height, width] bool mask.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...] in pixels, whose union counts; or a run-length encoding
            {"size": [height, width], "counts": string or list of integers}. A polygon of fewer than 3 points is empty.

    Raises:
        ValueError: no such thing, or of another size than the image.
    """
    # Only masks need it, and importing it takes a tenth of a second.
    from hotcoco import mask as rle

    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(f"'size' must be [{height}, {width}] as the image's, got {segmentation.get('size')!r}")
        return rle.decode(_plain_rle(segmentation)).astype(np.bool_)
    if not isinstance(segmentation, list):
        raise ValueError(f"expected a list of polygons or a run-length encoding, got {type(segmentation).__name__}")
    mask = np.zeros((height, width), dtype=np.bool_)
    for polygon in segmentation:
        mask |= _polygon_mask(polygon, width, height)
    return mask


def seed_worker(worker_id: int) -> None:
    """``worker_init_fn`` of a DataLoader: seeds python's and numpy's generators from the worker's own torch seed.

    Torch seeds itself in every worker and epoch; the augmentation draws from python's ``random``.
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)


def _annotated_size(image: dict[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def _clipped_corners(boxes_xywh_px: np.ndarray, width: int, height: int) -> Tensor:
    boxes = torch.from_numpy(boxes_xywh_px.copy())
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)
    return boxes


def _plain_rle(segmentation: dict[str, Any]) -> dict[str, Any]:
    counts = segmentation.get("counts")
    if isinstance(counts, list) and sum(counts) != segmentation["size"][0] * segmentation["size"][1]:
        raise ValueError(f"'counts' must sum to the number of pixels, got {sum(counts)} for {segmentation['size']}")
    return {"size": list(segmentation["size"]), "counts": counts}


def _polygon_mask(polygon: Any, width: int, height: int) -> np.ndarray:
    from hotcoco import mask as rle

    points = np.asarray(polygon, dtype=np.float64)
    if points.ndim != 1 or len(points) % 2 or not np.isfinite(points).all():
        raise ValueError(f"a polygon must be finite numbers [x0, y0, x1, y1, ...], got {polygon!r}")
    # The rasteriser takes 4 numbers for a box; two points bound no area.
    if len(points) < 6:
        return np.zeros((height, width), dtype=np.bool_)
    return rle.decode(rle.fr_poly(points.tolist(), height, width)).astype(np.bool_)
