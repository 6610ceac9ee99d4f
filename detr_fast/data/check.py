"""What is wrong with a data set, found before the first epoch: annotations, image files, boxes, counts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detr_fast.data.annotations import Fault, entry_name, find_faults, load_json, name_of
from detr_fast.data.images import ImageError, load_image
from detr_fast.data.report import DatasetReport, Finding, Spread

# Annotation tools round; a box that ends within a pixel of the border is no mistake.
_BORDER_TOLERANCE_PX = 1.0
# How much of a file must look like another box format, and how much must not fit as it stands, to say so.
_ALIKE = 0.95
_MISFIT = 0.05
# COCO's limits between small, medium and large objects, in square pixels.
_SMALL, _LARGE = 32**2, 96**2


def check_dataset(
    image_folder: str | os.PathLike[str],
    annotation_file: str | os.PathLike[str] | dict[str, Any],
    num_queries: int = 100,
    *,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetReport:
    """Check COCO-format data in full; every image is decoded.

    Args:
        image_folder: what the file names of the annotations are relative to.
        annotation_file: path of the JSON file, or its contents.
        num_queries: object queries of the model to be trained; it finds no more objects than that in an image.
        num_threads: images decoded at a time; None takes one a processor.
        progress: called with (images decoded, images) after each one.

    Returns:
        Counts and findings; ``ok`` is False where training would stop, or would learn from wrong boxes.

    Raises:
        AnnotationError: the annotation file is missing or is no JSON object.
    """
    contents = load_json(annotation_file)
    faults = list(find_faults(contents))
    source: dict[str, Any] = {"image_folder": str(image_folder), "annotation_file": name_of(annotation_file)}
    problems = _group_faults(faults)
    if any(fault.entry == "" for fault in faults):
        return DatasetReport(**source, num_queries=num_queries, problems=problems)
    data = _Data.of(contents, {fault.entry for fault in faults})
    problems += data.check_files(Path(image_folder), num_threads, progress)
    problems += data.box_format_findings()
    warnings = data.duplicate_findings(contents) + data.box_findings() + data.query_findings(num_queries)
    return DatasetReport(
        **source, num_queries=num_queries, problems=problems, warnings=warnings, **data.counts(num_queries)
    )


@dataclass
class _Data:
    """The usable entries as arrays: I images, A annotations, of which ``trained`` marks those that become targets."""

    images: list[dict[str, Any]]
    categories: dict[int, str]
    entries: list[str]  # [A] names for messages
    sizes: np.ndarray  # [I, 2] width and height; NaN where neither annotations nor file tell
    image: np.ndarray  # [A] index into images
    label: np.ndarray  # [A]
    boxes_xywh_px: np.ndarray  # [A, 4]
    crowd: np.ndarray  # [A] bool

    @staticmethod
    def of(contents: dict[str, Any], faulty: set[str]) -> _Data:
        images = [image for _, image in _sound("images", contents, faulty)]
        places = {image["id"]: index for index, image in enumerate(images)}
        kept = [(name, a) for name, a in _sound("annotations", contents, faulty) if a["image_id"] in places]
        return _Data(
            images=images,
            categories={c["id"]: str(c.get("name", c["id"])) for _, c in _sound("categories", contents, faulty)},
            entries=[name for name, _ in kept],
            sizes=np.array([_annotated_size(image) for image in images], dtype=np.float64).reshape(-1, 2),
            image=np.array([places[a["image_id"]] for _, a in kept], dtype=np.int64),
            label=np.array([a["category_id"] for _, a in kept], dtype=np.int64),
            boxes_xywh_px=np.array([a["bbox"] for _, a in kept], dtype=np.float64).reshape(-1, 4),
            crowd=np.array([bool(a.get("iscrowd", 0)) for _, a in kept], dtype=np.bool_),
        )

    def check_files(
        self, image_folder: Path, num_threads: int | None, progress: Callable[[int, int], None] | None
    ) -> list[Finding]:
        """Decode every image, fill in the sizes that the annotations lack, and report what does not fit."""
        found: list[tuple[int, int] | str] = []
        pool = ThreadPoolExecutor(num_threads or os.cpu_count() or 1)
        try:
            for result in pool.map(lambda place: self._decode(image_folder, place), range(len(self.images))):
                found.append(result)
                if progress is not None:
                    progress(len(found), len(self.images))
        finally:
            # Ctrl-C leaves at once instead of decoding the rest.
            pool.shutdown(cancel_futures=True)
        unreadable = [size for size in found if isinstance(size, str)]
        mismatched = []
        for place, size in enumerate(found):
            if isinstance(size, str):
                continue
            annotated = tuple(self.sizes[place])
            if np.isnan(annotated).any():
                self.sizes[place] = size
            elif annotated != size:
                said = "{:g} x {:g}".format(*annotated)
                mismatched.append(f"{self._name(place)} is {size[0]} x {size[1]}, the annotations say {said}")
        return [
            *_finding("unreadable image", "images are missing or cannot be decoded", unreadable),
            *_finding("image size", "images have another size than the annotations say", mismatched),
        ]

    def _decode(self, image_folder: Path, place: int) -> tuple[int, int] | str:
        """The upright (width, height) of an image file, or why it cannot be read."""
        annotated = (
            None if np.isnan(self.sizes[place]).any() else (int(self.sizes[place, 0]), int(self.sizes[place, 1]))
        )
        try:
            return load_image(image_folder / self.images[place]["file_name"], annotated_size=annotated).size
        except ImageError as error:
            return str(error)

    def box_format_findings(self) -> list[Finding]:
        """Boxes that make sense in another format only."""
        if not len(self.boxes_xywh_px):
            return []
        x, y, width, height = self.boxes_xywh_px.T
        image_width, image_height = self._box_image_sizes().T
        as_corners = (width > x) & (height > y) & (width <= image_width + 1) & (height <= image_height + 1)
        beyond = np.maximum(x + width - image_width, y + height - image_height) > _BORDER_TOLERANCE_PX
        as_fractions = (self.boxes_xywh_px <= 1).all(axis=1) & (np.maximum(image_width, image_height) > 2)
        findings = []
        if as_corners.mean() >= _ALIKE and beyond.mean() >= _MISFIT:
            text = "boxes look like corners [x0, y0, x1, y1]; COCO has [x, y, width, height]"
            findings += _finding("box format", text, self._box_examples(beyond & as_corners))
        if as_fractions.mean() >= _ALIKE:
            text = "boxes look like fractions of the image; COCO has pixels"
            findings += _finding("box format", text, self._box_examples(as_fractions))
        return findings

    def box_findings(self) -> list[Finding]:
        """Boxes that are clipped or dropped."""
        x, y, width, height = self.boxes_xywh_px.T
        empty = ~self.crowd & ((width <= 0) | (height <= 0))
        image_width, image_height = self._box_image_sizes().T
        outside = ~self.crowd & ~empty & ~self._has_area_inside()
        edges = np.stack((-x, -y, x + width - image_width, y + height - image_height))
        beyond = ~empty & ~outside & (edges.max(axis=0, initial=-np.inf) > _BORDER_TOLERANCE_PX)
        return [
            *_finding("box without area", "boxes have no area and are dropped", self._box_examples(empty)),
            *_finding("box outside", "boxes lie outside their image and are dropped", self._box_examples(outside)),
            *_finding("box beyond border", "boxes reach over the border and are clipped", self._box_examples(beyond)),
        ]

    def duplicate_findings(self, contents: dict[str, Any]) -> list[Finding]:
        """Entries that stand twice."""
        annotations = contents["annotations"]
        ids = Counter(a["id"] for a in annotations if isinstance(a, dict) and isinstance(a.get("id"), int))
        files = Counter(image["file_name"] for image in self.images)
        rows = zip(self.image.tolist(), self.label.tolist(), self.boxes_xywh_px.tolist(), strict=True)
        boxes = Counter((image, label, tuple(box)) for image, label, box in rows)
        same = [f"{self._name(image)}: {list(box)} of category {label}" for image, label, box in _repeated(boxes)]
        return [
            *_finding("duplicate id", "annotation ids stand more than once", [f"id {key}" for key in _repeated(ids)]),
            *_finding("duplicate file", "files belong to several image ids", list(_repeated(files))),
            *_finding("duplicate box", "boxes stand more than once in their image", same),
        ]

    def query_findings(self, num_queries: int) -> list[Finding]:
        """Images with more objects than the model can find."""
        counts = self._objects_per_image()
        crowded = [
            f"{self._name(place)} has {counts[place]}" for place in np.flatnonzero(counts > num_queries).tolist()
        ]
        return _finding("too many objects", f"images have more objects than the {num_queries} queries", crowded)

    def counts(self, num_queries: int) -> dict[str, Any]:
        """The report's numbers."""
        trained, objects = self._trained(), self._objects_per_image()
        per_label = Counter(self.label[trained].tolist())
        highest = max(self.categories, default=0)
        areas = self.boxes_xywh_px[trained, 2] * self.boxes_xywh_px[trained, 3]
        return {
            "num_images": len(self.images),
            "num_annotations": len(self.entries),
            "num_objects": int(trained.sum()),
            "num_crowd": int(self.crowd.sum()),
            "num_empty_images": int((objects == 0).sum()),
            "num_images_over_queries": int((objects > num_queries).sum()),
            "category_names": dict(sorted(self.categories.items())),
            "category_id_gaps": sorted(set(range(min(self.categories, default=0), highest)) - self.categories.keys()),
            "class_counts": {number: per_label[number] for number in sorted(self.categories)},
            "objects_per_image": Spread.of(objects),
            "image_widths": Spread.of(self.sizes[:, 0]),
            "image_heights": Spread.of(self.sizes[:, 1]),
            "box_areas": Spread.of(areas),
            "box_scales": {
                "small": int((areas < _SMALL).sum()),
                "medium": int(((areas >= _SMALL) & (areas < _LARGE)).sum()),
                "large": int((areas >= _LARGE).sum()),
            },
        }

    def _trained(self) -> np.ndarray:
        return ~self.crowd & self._has_area_inside()

    def _has_area_inside(self) -> np.ndarray:
        """[A] bool: whether something of the box is left after clipping; an image of unknown size clips nothing."""
        low = np.maximum(self.boxes_xywh_px[:, :2], 0)
        high = np.fmin(self.boxes_xywh_px[:, :2] + self.boxes_xywh_px[:, 2:], self._box_image_sizes())
        return (high > low).all(axis=1)

    def _objects_per_image(self) -> np.ndarray:
        return np.bincount(self.image[self._trained()], minlength=len(self.images))

    def _box_image_sizes(self) -> np.ndarray:
        return self.sizes[self.image]  # [A, 2]

    def _box_examples(self, chosen: np.ndarray) -> list[str]:
        return [
            f"{self.entries[i]} in {self._name(int(self.image[i]))}: {self.boxes_xywh_px[i].tolist()}"
            for i in np.flatnonzero(chosen)
        ]

    def _name(self, place: int) -> str:
        return f"{self.images[place]['file_name']} (id {self.images[place]['id']})"


def _annotated_size(image: dict[str, Any]) -> tuple[float, float]:
    width, height = image.get("width"), image.get("height")
    known = isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0
    return (width, height) if known else (np.nan, np.nan)  # type: ignore[return-value]


def _sound(section: str, contents: dict[str, Any], faulty: set[str]) -> list[tuple[str, dict[str, Any]]]:
    """(name for messages, entry) of the entries that nothing is wrong with; of equal ids, the first."""
    named = ((entry_name(section, index, entry), entry) for index, entry in enumerate(contents[section]))
    kept = [(name, entry) for name, entry in named if name not in faulty]
    if section == "annotations":
        return kept
    first = {entry["id"]: (name, entry) for name, entry in reversed(kept)}
    return list(reversed(first.values()))


def _group_faults(faults: Iterable[Fault]) -> list[Finding]:
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(str(fault))
    return [finding for kind, texts in kinds.items() for finding in _finding(kind, "entries are unusable", texts)]


def _finding(kind: str, text: str, examples: Sequence[str]) -> list[Finding]:
    return [Finding(kind, text, len(examples), tuple(examples[:5]))] if examples else []


def _repeated(counts: Counter[Any]) -> list[Any]:
    return [key for key, count in counts.items() if count > 1]
