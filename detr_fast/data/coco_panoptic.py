"""COCO's panoptic format, a JSON file and a PNG for each image, as the targets that DETR trains on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from detr_fast.data.annotations import AnnotationError, entry_name, load_json, name_of
from detr_fast.data.batch import Target
from detr_fast.data.coco import CocoDetection, Transform, category_names
from detr_fast.data.images import ImageError, load_image

Contents = str | os.PathLike[str] | dict[str, Any]
_NEEDED_KEYS = {
    "images": ("id", "file_name"),
    "categories": ("id", "isthing"),
    "annotations": ("image_id", "file_name", "segments_info"),
}
# A pixel of no segment.
VOID = 0


class CocoPanoptic(Dataset[tuple[Any, Target]]):
    """Images with their segments, things and stuff alike, in the order of the image ids.

    A target is as of ``CocoDetection``, for T segments, crowds among them as in the original ("iscrowd" says which).
    A box is the smallest that holds the segment's pixels: that of one pixel is 1 x 1, where the original's has no area.

    Args:
        image_folder: what the images' file names are relative to.
        annotation_folder: what the annotations' file names, those of the PNGs, are relative to.
        annotation_file: path of a COCO panoptic JSON file, or its contents.
        transforms: called with (RGB picture, target); None returns the picture itself.
        return_masks: put the segments' masks into the targets.

    Raises:
        AnnotationError: the annotations are unusable, or, on access, a PNG does not fit them; the message names them.
        ImageError: on access, an image is missing or damaged.
    """

    def __init__(
        self,
        image_folder: str | os.PathLike[str],
        annotation_folder: str | os.PathLike[str],
        annotation_file: Contents,
        transforms: Transform | None = None,
        return_masks: bool = True,
    ) -> None:
        self.image_folder = Path(image_folder)
        self.annotation_folder = Path(annotation_folder)
        self.annotation_file = annotation_file
        self.transforms = transforms
        self.return_masks = return_masks
        contents = read_panoptic(annotation_file)
        self.categories = category_names(contents)
        self.is_thing_map = thing_map(contents)
        self.annotations = {int(entry["image_id"]): entry for entry in contents["annotations"]}
        self._images = sorted(contents["images"], key=lambda image: image["id"])
        self.image_ids = [int(image["id"]) for image in self._images]

    @property
    def num_classes(self) -> int:
        """The highest category id + 1: ids may have gaps, and each is its own class."""
        return max(self.categories, default=-1) + 1

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        entry = self._images[index]
        size = (entry["width"], entry["height"]) if {"width", "height"} <= entry.keys() else None
        image = load_image(self.image_path(index), annotated_size=size)
        target = self.target(index, image.size)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def image_path(self, index: int) -> Path:
        """The file of image ``index``."""
        return self.image_folder / self._images[index]["file_name"]

    def target(self, index: int, size: tuple[int, int]) -> Target:
        """The untransformed target of image ``index``, whose (width, height) is ``size``."""
        entry = self.annotations[self.image_ids[index]]
        path = self.annotation_folder / entry["file_name"]
        ids = read_segment_ids(path)
        if ids.shape != size[::-1]:
            raise AnnotationError(f"{path} is {ids.shape[1]} x {ids.shape[0]} pixels, its image {size[0]} x {size[1]}")
        masks = segment_masks(ids, entry["segments_info"], str(path))
        target = {
            "boxes": boxes_of_masks(masks),
            "labels": torch.tensor([info["category_id"] for info in entry["segments_info"]], dtype=torch.int64),
            "area": torch.from_numpy(masks.sum((1, 2))).to(torch.float32),
            "iscrowd": torch.tensor([info.get("iscrowd", 0) for info in entry["segments_info"]], dtype=torch.int64),
            "image_id": torch.tensor([self.image_ids[index]]),
            "orig_size": torch.tensor(ids.shape),
            "size": torch.tensor(ids.shape),
        }
        return {**target, "masks": torch.from_numpy(masks)} if self.return_masks else target


def open_dataset(
    images: str | os.PathLike[str],
    annotations: Contents,
    segments: str | os.PathLike[str] | None,
    transforms: Transform | None,
    *,
    masks: bool,
    shortest: int | None = None,
) -> CocoDetection | CocoPanoptic:
    """A data set of COCO's panoptic format where ``segments``, the folder of its PNGs, is given; else of instances.

    ``shortest`` is ``CocoDetection``'s, and for it alone: segments are of the whole picture.
    """
    if segments is not None:
        return CocoPanoptic(images, segments, annotations, transforms, return_masks=masks)
    return CocoDetection(images, annotations, transforms, return_masks=masks, shortest=shortest)


def read_panoptic(source: Contents) -> dict[str, Any]:
    """Read a COCO panoptic annotation file and hold it to the format; its PNGs are not looked at.

    Raises:
        AnnotationError: names the file, the first entry that is wrong, and how many more there are.
    """
    contents = load_json(source)
    faults = list(_faults(contents))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise AnnotationError(f"{name_of(source)}: {faults[0]}{more}")
    return contents


def thing_map(contents: dict[str, Any]) -> dict[int, bool]:
    """Category id to whether it is a thing (True) or stuff."""
    return {int(category["id"]): bool(category["isthing"]) for category in contents["categories"]}


def read_segment_ids(path: str | os.PathLike[str]) -> np.ndarray:
    """The segment of each pixel, [height, width] int32: red + 256 green + 65536 blue of a PNG; 0 is no segment.

    Raises:
        ImageError: the file is missing or damaged.
        AnnotationError: it has no three colours.
    """
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
    except FileNotFoundError as error:
        raise ImageError(f"segments {path} do not exist") from error
    # Pillow's decoders raise SyntaxError, struct.error, IndexError and others besides OSError on damaged files.
    except Exception as error:
        raise ImageError(f"segments {path} cannot be read: {type(error).__name__}: {error}") from error
    if mode not in ("RGB", "RGBA"):
        raise AnnotationError(f"{path} must be an RGB picture, whose colours are ids of segments, got mode {mode!r}")
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 65536 * blue


def segment_masks(ids: np.ndarray, segments_info: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """[T, height, width] bool, a mask for each entry of ``segments_info``.

    Raises:
        AnnotationError: a segment has no pixel, or a pixel's segment no entry; the message has ``name``.
    """
    listed = np.array([info["id"] for info in segments_info], dtype=np.int32)
    masks = ids[None] == listed[:, None, None]
    areas = masks.sum((1, 2))
    if not areas.all():
        raise AnnotationError(
            f"{name} has no pixel of segment {listed[areas == 0][0]}, which its 'segments_info' lists"
        )
    if areas.sum() + np.count_nonzero(ids == VOID) != ids.size:
        unlisted = sorted(set(np.unique(ids).tolist()) - {VOID, *listed.tolist()})
        raise AnnotationError(f"{name} has pixels of segment {unlisted[0]}, which its 'segments_info' lacks")
    return masks


def boxes_of_masks(masks: np.ndarray) -> Tensor:
    """[T, height, width] bool, none of them empty, to the smallest boxes [T, 4] xyxy in pixels, float32."""
    sides = []
    for lines in (np.any(masks, 1), np.any(masks, 2)):  # columns, then rows: [T, length]
        sides += [lines.argmax(1), lines.shape[1] - lines[:, ::-1].argmax(1)]
    left, right, top, bottom = sides
    return torch.from_numpy(np.stack((left, top, right, bottom), 1).astype(np.float32))


def _faults(contents: dict[str, Any]) -> Iterator[str]:
    for section in _NEEDED_KEYS:
        if not isinstance(contents.get(section), list):
            yield f"the list '{section}' is missing; a COCO panoptic file has {', '.join(_NEEDED_KEYS)}"
            return
    for section, keys in _NEEDED_KEYS.items():
        for index, entry in enumerate(contents[section]):
            missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if missing:
                yield f"{entry_name(section, index, entry)}: the key '{missing[0]}' is missing"
                return
    if not contents["images"]:
        yield "'images' is empty"
    yield from _repeated(contents)
    annotated = {entry["image_id"] for entry in contents["annotations"]}
    yield from (f"image {x['id']} has no annotation" for x in contents["images"] if x["id"] not in annotated)
    known = {category["id"] for category in contents["categories"]}
    for index, entry in enumerate(contents["annotations"]):
        yield from _segment_faults(entry_name("annotations", index, entry), entry["segments_info"], known)


def _repeated(contents: dict[str, Any]) -> Iterator[str]:
    for section, key in (("images", "id"), ("categories", "id"), ("annotations", "image_id")):
        seen: set[Any] = set()
        for index, entry in enumerate(contents[section]):
            if entry[key] in seen:
                yield f"{entry_name(section, index, entry)}: '{key}' {entry[key]} stands there already"
            seen.add(entry[key])


def _segment_faults(name: str, segments_info: Sequence[dict[str, Any]], categories: set[int]) -> Iterator[str]:
    seen = {VOID}
    for number, info in enumerate(segments_info):
        if not {"id", "category_id"} <= info.keys():
            yield f"{name}: segment {number} must have 'id' and 'category_id', got {sorted(info)}"
            continue
        if not isinstance(info["id"], int) or not VOID < info["id"] < 256**3 or info["id"] in seen:
            yield f"{name}: the ids of segments must be different numbers from 1 to {256**3 - 1}, got {info['id']!r}"
        if info["category_id"] not in categories:
            yield f"{name}: segment {info['id']}: 'category_id' {info['category_id']!r} is no id in 'categories'"
        seen.add(info["id"])
