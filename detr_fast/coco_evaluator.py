"""COCO average precision from detections, collected on one process or many."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hotcoco
import numpy as np
import torch
from torch import Tensor

from detr_fast.data.annotations import AnnotationError, entry_name, name_of, read_annotations
from detr_fast.data.coco import category_names
from detr_fast.distributed import all_gather_objects

# hotcoco and faster-coco-eval both give pycocotools' numbers. hotcoco is the one taken: it prints nothing unless asked,
# takes detections as an array and an empty list of them, refuses NaN scores and broken run lengths instead of counting
# them, has type stubs, and one wheel serves every Python from 3.10 on. Its `mask` also decodes the training masks.

STAT_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# What pycocotools reports where there is nothing to measure, such as AP of small objects where there are none.
ABSENT = -1.0

_DESCRIPTIONS = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small, area below 32² px",
    "APm": "medium",
    "APl": "large, area above 96² px",
    "AR1": "1 detection an image",
    "AR10": "10 detections an image",
    "AR100": "100 detections an image",
    "ARs": "small",
    "ARm": "medium",
    "ARl": "large",
}


@dataclass(frozen=True)
class CocoResult:
    """The twelve COCO numbers and the AP of each class.

    Attributes:
        iou_type: "bbox" or "segm".
        stats: ``STAT_NAMES`` to [0, 1], or -1 where no object is of that kind.
        per_class: category name to AP, or -1 for a category without objects; names that stand twice carry their id.
        num_images: images that count.
        num_unseen: how many of them were never passed to ``update``; they count as images without detections.
    """

    iou_type: str
    stats: dict[str, float]
    per_class: dict[str, float]
    num_images: int
    num_unseen: int = 0

    def table(self) -> str:
        """The numbers as lines of text, in percent; "-" where there is nothing to measure."""
        lines = [f"COCO {self.iou_type}, {self.num_images} images"]
        if self.num_unseen:
            lines.append(f"{self.num_unseen} of them got no prediction and count as images without detections")
        lines += [f"  {name:<6}{_percent(self.stats[name])}  {text}" for name, text in _DESCRIPTIONS.items()]
        measured = {name: value for name, value in self.per_class.items() if value != ABSENT}
        width = max(map(len, measured), default=0)
        lines += ["AP of each class"] + [f"  {name:<{width}}{_percent(value)}" for name, value in measured.items()]
        if len(measured) < len(self.per_class):
            lines.append(f"  {len(self.per_class) - len(measured)} classes have no object here")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {"stats": self.stats, "per_class": self.per_class} | {
            key: getattr(self, key) for key in ("iou_type", "num_images", "num_unseen")
        }

    def to_json(self) -> str:
        """``as_dict`` as JSON text."""
        return json.dumps(self.as_dict(), indent=2)


class CocoEvaluator:
    """Collects detections and measures their COCO average precision.

    Args:
        annotations: path of a COCO annotation file, or its contents.
        iou_types: "bbox", "segm" or both.
        image_ids: the images that count; None takes all of the annotations.

    Raises:
        AnnotationError: the annotations are unusable, or "segm" is asked for and one has no "segmentation".
        ValueError: an IoU type or image id is unknown.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str] | dict[str, Any],
        iou_types: Sequence[str] = ("bbox",),
        image_ids: Sequence[int] | None = None,
    ) -> None:
        unknown = set(iou_types) - {"bbox", "segm"}
        if unknown or not iou_types:
            raise ValueError(f"iou_types must be of 'bbox' and 'segm', at least one, got {tuple(iou_types)}")
        contents = read_annotations(annotations)
        self.iou_types = tuple(iou_types)
        self.categories = category_names(contents)
        self.image_ids = sorted({image["id"] for image in contents["images"]} if image_ids is None else set(image_ids))
        self._place = {number: place for place, number in enumerate(self.image_ids, start=1)}
        self._ground_truth = self._read_ground_truth(contents, name_of(annotations))
        self._detections: dict[int, _Detections] = {}

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add the detections of some images; an image that was added before keeps its first ones.

        Args:
            predictions: image id to "scores" [N], "labels" [N] category ids, "boxes" [N, 4] xyxy in pixels of the
                annotated image and, for "segm", "masks" [N, H, W] or [N, 1, H, W], bool or probabilities. An image
                without detections is passed with empty tensors or an empty dictionary. Labels that are no category
                are left out, as they can match nothing.

        Raises:
            ValueError: an image id is unknown, a shape is not as above, or a number is not finite.

        Waits for the device of the tensors.
        """
        for image_id, prediction in predictions.items():
            if image_id not in self._place:
                raise ValueError(f"image id {image_id} is not among the {len(self.image_ids)} images that count")
            if image_id not in self._detections:
                with_masks = "segm" in self.iou_types
                self._detections[image_id] = _Detections.of(image_id, prediction, self.categories, with_masks)

    def synchronize(self) -> None:
        """Give every process the detections of all; an image that several have seen counts once."""
        merged: dict[int, _Detections] = {}
        for detections in all_gather_objects(self._detections):
            merged = detections | merged
        self._detections = merged

    def summarize(self, iou_type: str | None = None) -> CocoResult:
        """Measure what was added so far; on several processes, call ``synchronize`` first.

        Args:
            iou_type: one of those asked for; None takes the first.
        """
        iou_type = iou_type or self.iou_types[0]
        if iou_type not in self.iou_types:
            raise ValueError(f"iou_type must be one of {self.iou_types}, got {iou_type!r}")
        ground_truth = self._ground_truth
        evaluation = hotcoco.COCOeval(ground_truth, ground_truth.load_res(self._results(iou_type)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summary_lines()
        stats = evaluation.get_results()
        return CocoResult(
            iou_type=iou_type,
            stats={name: float(stats[name]) for name in STAT_NAMES},
            per_class=self._per_class(evaluation),
            num_images=len(self.image_ids),
            num_unseen=len(self.image_ids) - len(self._detections),
        )

    def _read_ground_truth(self, contents: dict[str, Any], source: str) -> hotcoco.COCO:
        # Numbered anew: pycocotools' matching takes annotation id 0 for "no match" and loses one of two equal ids, and
        # detections travel as an array of floats, where only small image ids are exact.
        images = [
            image | {"id": self._place[image["id"]]} for image in contents["images"] if image["id"] in self._place
        ]
        if len(images) < len(self.image_ids):
            raise ValueError(f"{source} lacks {len(self.image_ids) - len(images)} of the image_ids asked for")
        annotations = [
            self._object(entry, number, f"{source}: {entry_name('annotations', number - 1, entry)}")
            for number, entry in enumerate(contents["annotations"], start=1)
            if entry["image_id"] in self._place
        ]
        categories = [{"id": number, "name": name} for number, name in self.categories.items()]
        return hotcoco.COCO({"images": images, "annotations": annotations, "categories": categories})

    def _object(self, entry: dict[str, Any], number: int, name: str) -> dict[str, Any]:
        kept = {key: entry[key] for key in ("category_id", "bbox")}
        kept |= {"id": number, "image_id": self._place[entry["image_id"]], "iscrowd": entry.get("iscrowd", 0)}
        kept["area"] = entry.get("area", entry["bbox"][2] * entry["bbox"][3])
        if "segm" in self.iou_types:
            if not entry.get("segmentation"):
                raise AnnotationError(f"{name}: evaluating masks needs the key 'segmentation'")
            kept["segmentation"] = entry["segmentation"]
        return kept

    def _results(self, iou_type: str) -> np.ndarray | list[dict[str, Any]]:
        if iou_type == "segm":
            items = self._detections.items()
            return [result for number, found in items for result in found.mask_results(self._place[number])]
        rows = [found.box_rows(self._place[number]) for number, found in self._detections.items()]
        return np.concatenate([np.zeros((0, 7)), *rows])

    def _per_class(self, evaluation: hotcoco.COCOeval) -> dict[str, float]:
        assert evaluation.eval is not None
        precision = np.asarray(evaluation.eval["precision"])[..., 0, -1]  # [IoU, recall, category]: all areas, 100
        names = list(self.categories.values())
        values = {}
        for column, (number, name) in enumerate(self.categories.items()):
            measured = precision[..., column][precision[..., column] > ABSENT]
            key = f"{name} ({number})" if names.count(name) > 1 else name
            values[key] = float(measured.mean()) if measured.size else ABSENT
        return values


@dataclass(frozen=True)
class _Detections:
    """The detections of one image on the host."""

    scores: np.ndarray  # [N]
    labels: np.ndarray  # [N]
    boxes_xywh_px: np.ndarray  # [N, 4]
    masks: list[dict[str, Any]] = field(default_factory=list)  # run-length encodings, where masks are evaluated

    @staticmethod
    def of(
        image_id: int, prediction: Mapping[str, Tensor], categories: Mapping[int, str], with_masks: bool
    ) -> _Detections:
        if not prediction:
            return _Detections(np.zeros(0), np.zeros(0), np.zeros((0, 4)))
        scores, labels, boxes = (prediction[key].detach().cpu() for key in ("scores", "labels", "boxes"))
        if boxes.shape != (len(scores), 4) or labels.shape != scores.shape:
            shapes = {key: list(value.shape) for key, value in prediction.items()}
            raise ValueError(f"image {image_id}: expected scores [N], labels [N] and boxes [N, 4], got {shapes}")
        if not (scores.isfinite().all() and boxes.isfinite().all()):
            raise ValueError(f"image {image_id}: scores and boxes must be finite, got NaN or infinity")
        known = torch.isin(labels, torch.tensor(list(categories), dtype=labels.dtype))
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)
        masks = _encode(image_id, prediction, known) if with_masks else []
        arrays = (scores[known].double().numpy(), labels[known].numpy(), boxes[known].double().numpy())
        return _Detections(*arrays, masks)

    def box_rows(self, image: int) -> np.ndarray:
        """[N, 7]: image, x, y, width, height, score, category."""
        columns = (np.full(len(self.scores), image), self.boxes_xywh_px, self.scores, self.labels)
        return np.column_stack(columns)

    def mask_results(self, image: int) -> Iterator[dict[str, Any]]:
        # Without a box, so that the area that decides between small and large is the mask's.
        for score, label, mask in zip(self.scores.tolist(), self.labels.tolist(), self.masks, strict=True):
            yield {"image_id": image, "category_id": label, "segmentation": mask, "score": score}


def _encode(image_id: int, prediction: Mapping[str, Tensor], known: Tensor) -> list[dict[str, Any]]:
    if "masks" not in prediction:
        raise ValueError(f"image {image_id}: 'segm' needs the key 'masks', got {sorted(prediction)}")
    masks = prediction["masks"].detach().cpu()[known]
    masks = masks.flatten(0, 1) if masks.ndim == 4 else masks  # [N, H, W]
    binary = (masks > 0.5).numpy().astype(np.uint8)
    return [hotcoco.mask.encode(np.asfortranarray(mask)) for mask in binary]


def _percent(value: float) -> str:
    return "      -" if value == ABSENT else f"{100 * value:7.1f}"
