"""Panoptic quality from segmentations, collected on one process or many (Kirillov et al. 2019)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import panoptic
from PIL import Image

from detr_fast.data.coco import category_names
from detr_fast.data.coco_panoptic import read_panoptic, thing_map
from detr_fast.distributed import all_gather_objects

# hotcoco gives panopticapi's numbers, and panopticapi is on no package index.


@dataclass(frozen=True)
class Quality:
    """Panoptic, segmentation and recognition quality in [0, 1], averaged over ``classes`` of them; pq = sq rq for one.

    Attributes:
        pq, sq, rq: the qualities.
        classes: how many have a segment, true or predicted.
        tp, fp, fn: segments that match (IoU above 0.5), that are predicted and do not, that are true and do not.
    """

    pq: float
    sq: float
    rq: float
    classes: int
    tp: int
    fp: int
    fn: int

    def row(self) -> str:
        """As text, in percent."""
        return f"{100 * self.pq:7.1f}{100 * self.sq:7.1f}{100 * self.rq:7.1f}{self.tp:7}{self.fp:7}{self.fn:7}"


@dataclass(frozen=True)
class PanopticResult:
    """The qualities of all classes, of things, of stuff, and of each class that has a segment.

    Attributes:
        every, things, stuff: averages.
        per_class: category name to quality; names that stand twice carry their id.
        num_images: images that count.
        num_unseen: how many of them were never passed to ``update``; they count as images without segments.
        unknown: names of the classes that were predicted and that the annotations do not have.
    """

    every: Quality
    things: Quality
    stuff: Quality
    per_class: dict[str, Quality]
    num_images: int
    num_unseen: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def stats(self) -> dict[str, float]:
        """ "PQ", "SQ" and "RQ"; of things and stuff with "_things" and "_stuff" behind them."""
        groups = {"": self.every, "_things": self.things, "_stuff": self.stuff}
        return {f"{key.upper()}{end}": getattr(q, key) for end, q in groups.items() for key in ("pq", "sq", "rq")}

    def table(self) -> str:
        """The numbers as lines of text, in percent."""
        rows = {"all": self.every, "things": self.things, "stuff": self.stuff}
        width = max(map(len, [*rows, *self.per_class]))
        lines = [f"COCO panoptic, {self.num_images} images"]
        if self.num_unseen:
            lines.append(f"{self.num_unseen} of them got no prediction and count as images without segments")
        if self.unknown:
            more = f" and {len(self.unknown) - 5} more" if len(self.unknown) > 5 else ""
            lines.append(f"found, but not among the annotations' classes: {', '.join(self.unknown[:5])}{more}")
            lines.append("  such segments are false positives, and each such class counts in the averages, with 0")
        lines.append(f"  {'':<{width}}     PQ     SQ     RQ     TP     FP     FN")
        lines += [f"  {name:<{width}}{quality.row()}" for name, quality in rows.items()]
        return "\n".join([*lines, "Each class", *(f"  {name:<{width}}{q.row()}" for name, q in self.per_class.items())])

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(asdict(self), indent=2)


class PanopticEvaluator:
    """Collects panoptic segmentations and measures their quality.

    A predicted class that is not among the annotations' is a class without a true segment: its segments are false
    positives, unless most of one lies where nothing is annotated.

    Args:
        annotations: path of a COCO panoptic annotation file, or its contents.
        folder: where its PNGs are.
        names: of classes that the annotations do not have.

    Raises:
        AnnotationError: the annotations are unusable.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str] | dict[str, Any],
        folder: str | os.PathLike[str],
        *,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.names = dict(names or {})
        self.contents = read_panoptic(annotations)
        self.folder = Path(folder)
        self.categories = category_names(self.contents)
        self.is_thing_map = thing_map(self.contents)
        self.annotations = {int(entry["image_id"]): entry for entry in self.contents["annotations"]}
        self._predictions: dict[int, Mapping[str, Any]] = {}

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Add the segmentations of some images; an image that was added before keeps its first one.

        Args:
            predictions: image id to "png_string" and "segments_info", as ``PostProcessPanoptic`` gives them, at the
                size of the annotated image. A pixel whose colour is 0 is of no segment unless 0 is one's id.

        Raises:
            ValueError: an image id is unknown.
        """
        for image_id, prediction in predictions.items():
            if image_id not in self.annotations:
                raise ValueError(f"image id {image_id} is not among the {len(self.annotations)} annotated images")
            self._predictions.setdefault(image_id, prediction)

    def synchronize(self) -> None:
        """Give every process the segmentations of all; an image that several have seen counts once."""
        merged: dict[int, Mapping[str, Any]] = {}
        for predictions in all_gather_objects(self._predictions):
            merged = {**predictions, **merged}
        self._predictions = merged

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the segmentations in COCO's format: a PNG an image, and predictions.json, whose path is returned."""
        folder, entries = Path(folder), []
        folder.mkdir(parents=True, exist_ok=True)
        for image_id, prediction in sorted(self._predictions.items()):
            name = self.annotations[image_id]["file_name"]
            (folder / name).write_bytes(prediction["png_string"])
            entries.append({"image_id": image_id, "file_name": name, "segments_info": prediction["segments_info"]})
        path = folder / "predictions.json"
        path.write_text(json.dumps({"annotations": entries}))
        return path

    def summarize(self) -> PanopticResult:
        """Measure what was added so far; on several processes, call ``synchronize`` first.

        Raises:
            ValueError: a PNG does not fit its image, or its "segments_info".
        """
        unknown = self._unknown()
        with tempfile.TemporaryDirectory() as folder:
            files = self._files(Path(folder), unknown)
            evaluation = panoptic.PanopticEval(*files, gt_folder=self.folder, pred_folder=folder)
            evaluation.evaluate()
            return self._result(evaluation.results(), unknown)

    def _unknown(self) -> list[dict[str, Any]]:
        """The predicted classes that the annotations do not have, as entries of their "categories"."""
        found: dict[int, bool] = {}
        for prediction in self._predictions.values():
            for info in prediction["segments_info"]:
                if info["category_id"] not in self.categories:
                    found.setdefault(int(info["category_id"]), bool(info.get("isthing", True)))
        return [
            {"id": key, "name": self.names.get(key, f"class {key}"), "isthing": int(is_thing)}
            for key, is_thing in sorted(found.items())
        ]

    def _files(self, folder: Path, unknown: list[dict[str, Any]]) -> tuple[Path, Path]:
        """The annotations and the predictions as files; an image without prediction gets an empty one."""
        unseen = self.annotations.keys() - self._predictions.keys()
        path = self.write(folder)
        entries = json.loads(path.read_text())["annotations"]
        for image_id in unseen:
            name = self.annotations[image_id]["file_name"]
            with Image.open(self.folder / name) as truth:
                Image.new("RGB", truth.size).save(folder / name)
            entries.append({"image_id": image_id, "file_name": name, "segments_info": []})
        path.write_text(json.dumps({"annotations": entries}))
        truth_path = folder / "annotations.json"
        categories = [*self.contents["categories"], *unknown]
        truth_path.write_text(json.dumps({**_with_optional_keys(self.contents), "categories": categories}))
        return truth_path, path

    def _result(self, results: Mapping[str, Any], unknown: list[dict[str, Any]]) -> PanopticResult:
        categories = self.categories | {entry["id"]: entry["name"] for entry in unknown}
        is_thing = self.is_thing_map | {entry["id"]: bool(entry["isthing"]) for entry in unknown}
        names = list(categories.values())
        found = {int(key): value for key, value in results["per_class"].items()}
        counted = {key: value for key, value in found.items() if value["tp"] + value["fp"] + value["fn"] > 0}
        per_class = {
            f"{name} ({key})" if names.count(name) > 1 else name: _quality(counted[key], [counted[key]])
            for key, name in categories.items()
            if key in counted
        }
        groups = {
            "All": list(counted.values()),
            "Things": [value for key, value in counted.items() if is_thing[key]],
            "Stuff": [value for key, value in counted.items() if not is_thing[key]],
        }
        every, things, stuff = (_quality(results.get(name), values) for name, values in groups.items())
        unseen = len(self.annotations) - len(self._predictions)
        foreign = tuple(entry["name"] for entry in unknown)
        return PanopticResult(every, things, stuff, per_class, len(self.annotations), unseen, foreign)


def _quality(averages: Mapping[str, float] | None, classes: list[dict[str, Any]]) -> Quality:
    sums = [int(np.sum([one[key] for one in classes])) for key in ("tp", "fp", "fn")]
    if not averages or not classes:
        return Quality(0.0, 0.0, 0.0, 0, *sums)
    return Quality(averages["pq"], averages["sq"], averages["rq"], len(classes), *sums)


def _with_optional_keys(contents: dict[str, Any]) -> dict[str, Any]:
    """With the keys that the format has and this package does without."""
    annotations = [
        {**entry, "segments_info": [{"iscrowd": 0, **info} for info in entry["segments_info"]]}
        for entry in contents["annotations"]
    ]
    return {**contents, "annotations": annotations}
