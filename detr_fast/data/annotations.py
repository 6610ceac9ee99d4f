"""COCO-format annotation files: what must hold in one, and which entry breaks it."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

# What the loader cannot do without; anything else in an entry is optional.
_NEEDED_KEYS = {
    "images": ("id", "file_name"),
    "categories": ("id",),
    "annotations": ("image_id", "category_id", "bbox"),
}


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message names the file, the entry and its key."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in an annotation file: its kind, which entry, and what was expected and found."""

    kind: str
    entry: str
    message: str

    def __str__(self) -> str:
        return f"{self.entry}: {self.message}" if self.entry else self.message


def read_annotations(source: str | os.PathLike[str] | dict[str, Any]) -> dict[str, Any]:
    """Read a COCO annotation file and hold it to the format.

    Args:
        source: path of a JSON file, or its contents.

    Returns:
        A dictionary with the lists "images", "annotations" and "categories", as in the file.

    Raises:
        AnnotationError: names the file, the first entry that is wrong, its key, and how many more there are.
    """
    contents = load_json(source)
    faults = find_faults(contents)
    first = next(faults, None)
    if first is not None:
        more = sum(1 for _ in faults)
        rest = f" (and {more} more; `detr-fast check-data` lists them)" if more else ""
        raise AnnotationError(f"{name_of(source)}: {first}{rest}")
    return contents


def load_json(source: str | os.PathLike[str] | dict[str, Any]) -> dict[str, Any]:
    """The contents of a JSON file that holds an object; a dictionary is passed through.

    Raises:
        AnnotationError: the file is missing, is no JSON, or holds no object.
    """
    if isinstance(source, dict):
        return source
    try:
        contents = json.loads(Path(source).read_bytes())
    except OSError as error:
        raise AnnotationError(f"annotation file {Path(source)} cannot be opened: {error.strerror or error}") from error
    except ValueError as error:
        raise AnnotationError(f"annotation file {Path(source)} is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise AnnotationError(f"{Path(source)}: expected an object, got {type(contents).__name__}")
    return contents


def name_of(source: str | os.PathLike[str] | dict[str, Any]) -> str:
    """How messages call an annotation source."""
    return "annotations" if isinstance(source, dict) else str(Path(source))


def find_faults(contents: dict[str, Any]) -> Iterator[Fault]:
    """Everything in ``contents`` that keeps it from being used, in the order of the file.

    Boxes of zero size and boxes outside the image are no faults: the loader drops and clips them.
    """
    missing = [key for key in _NEEDED_KEYS if key not in contents]
    wrong = [key for key in _NEEDED_KEYS if key in contents and not isinstance(contents[key], list)]
    for key in missing:
        yield Fault("missing key", "", f"the key '{key}' is missing; a COCO file has {', '.join(_NEEDED_KEYS)}")
    for key in wrong:
        yield Fault("wrong type", "", f"'{key}' must be a list, got {type(contents[key]).__name__}")
    if missing or wrong:
        return
    if not contents["images"]:
        yield Fault("no images", "", "'images' is empty")
    yield from _image_faults(contents["images"])
    yield from _category_faults(contents["categories"])
    image_ids = {image["id"] for image in contents["images"] if _has_id(image)}
    category_ids = {category["id"] for category in contents["categories"] if _has_id(category)}
    for index, annotation in enumerate(contents["annotations"]):
        yield from _annotation_faults(annotation, index, image_ids, category_ids)


def _image_faults(images: list[Any]) -> Iterator[Fault]:
    for index, image in enumerate(images):
        entry = entry_name("images", index, image)
        yield from _key_faults("images", entry, image)
        if isinstance(image, dict) and not isinstance(image.get("file_name", ""), str):
            yield Fault("wrong type", entry, f"'file_name' must be a string, got {image['file_name']!r}")
    yield from _duplicate_faults("images", images)


def _category_faults(categories: list[Any]) -> Iterator[Fault]:
    for index, category in enumerate(categories):
        entry = entry_name("categories", index, category)
        yield from _key_faults("categories", entry, category)
        if _has_id(category) and category["id"] < 0:
            yield Fault("negative id", entry, f"'id' must be at least 0, got {category['id']}")
    yield from _duplicate_faults("categories", categories)


def _annotation_faults(annotation: Any, index: int, image_ids: set[int], category_ids: set[int]) -> Iterator[Fault]:
    # The common case first: a large file has a million of these.
    if _is_sound(annotation, image_ids, category_ids):
        return
    entry = entry_name("annotations", index, annotation)
    faults = list(_key_faults("annotations", entry, annotation))
    yield from faults
    if not isinstance(annotation, dict):
        return
    if "image_id" in annotation and not _is_in(annotation["image_id"], image_ids):
        yield Fault("unknown image", entry, f"'image_id' {annotation['image_id']!r} is no id in 'images'")
    if "category_id" in annotation and not _is_in(annotation["category_id"], category_ids):
        yield Fault("unknown category", entry, f"'category_id' {annotation['category_id']!r} is no id in 'categories'")
    if "bbox" in annotation:
        yield from _box_faults(annotation["bbox"], entry)
    if not _is_number(annotation.get("area", 0.0)):
        yield Fault("bad area", entry, f"'area' must be a finite number, got {annotation['area']!r}")
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield Fault("bad iscrowd", entry, f"'iscrowd' must be 0 or 1, got {annotation['iscrowd']!r}")


def _is_sound(annotation: Any, image_ids: set[int], category_ids: set[int]) -> bool:
    try:
        x, y, width, height = annotation["bbox"]
        return (
            annotation["image_id"] in image_ids
            and annotation["category_id"] in category_ids
            and math.isfinite(x + y + width + height + annotation.get("area", 0.0))
            and width >= 0
            and height >= 0
            and annotation.get("iscrowd", 0) in (0, 1)
        )
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return False


def _box_faults(bbox: Any, entry: str) -> Iterator[Fault]:
    if not isinstance(bbox, list | tuple) or len(bbox) != 4:
        yield Fault("bad bbox", entry, f"'bbox' must be 4 numbers [x, y, width, height], got {bbox!r}")
    elif not all(_is_number(value) for value in bbox):
        yield Fault("bad bbox", entry, f"'bbox' must be finite numbers, got {bbox!r}")
    elif min(bbox[2:]) < 0:
        yield Fault("bad bbox", entry, f"'bbox' [x, y, width, height] must not have a negative size, got {bbox!r}")


def _key_faults(section: str, entry: str, value: Any) -> Iterator[Fault]:
    if not isinstance(value, dict):
        yield Fault("wrong type", entry, f"must be an object, got {type(value).__name__}")
        return
    for key in _NEEDED_KEYS[section]:
        if key not in value:
            yield Fault("missing key", entry, f"the key '{key}' is missing")
    if "id" in _NEEDED_KEYS[section] and "id" in value and not _has_id(value):
        yield Fault("wrong type", entry, f"'id' must be an integer, got {value['id']!r}")


def _duplicate_faults(section: str, entries: list[Any]) -> Iterator[Fault]:
    counts = Counter(entry["id"] for entry in entries if _has_id(entry))
    for number, count in counts.items():
        if count > 1:
            yield Fault("duplicate id", section, f"'id' {number} stands {count} times")


def entry_name(section: str, index: int, value: Any) -> str:
    """How messages call an entry: its place in the list and its id."""
    suffix = f" (id {value['id']!r})" if isinstance(value, dict) and "id" in value else ""
    return f"{section}[{index}]{suffix}"


def _has_id(value: Any) -> bool:
    number = value.get("id") if isinstance(value, dict) else None
    return isinstance(number, Integral) and not isinstance(number, bool)


def _is_in(value: Any, numbers: set[int]) -> bool:
    return isinstance(value, Integral) and value in numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
