"""What a check of a data set found, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found: how often, and a few of the places."""

    kind: str
    text: str
    count: int
    examples: tuple[str, ...] = ()

    def render(self) -> str:
        """Lines of text: what, how often, and where."""
        more = [f"and {self.count - len(self.examples)} more"] if self.count > len(self.examples) else []
        return "\n".join([f"  {self.count} {self.text}"] + [f"      {line}" for line in (*self.examples, *more)])


@dataclass(frozen=True)
class Spread:
    """How numbers are spread."""

    minimum: float = 0.0
    median: float = 0.0
    mean: float = 0.0
    percentile_95: float = 0.0
    maximum: float = 0.0

    @staticmethod
    def of(values: np.ndarray) -> Spread:
        """The spread of those ``values`` that are known; zeros where there are none."""
        known = values[np.isfinite(values)].astype(np.float64)
        if not known.size:
            return Spread()
        low, median, high_95, high = np.percentile(known, (0, 50, 95, 100)).tolist()
        return Spread(low, median, float(known.mean()), high_95, high)

    def __str__(self) -> str:
        middle = f"median {self.median:g}, mean {self.mean:.4g}, 95 % at most {self.percentile_95:g}"
        return f"{self.minimum:g} to {self.maximum:g}, {middle}"


@dataclass(frozen=True)
class DatasetReport:
    """Counts over a data set, and what is wrong with it.

    Objects are the annotations that become training targets: no crowd region, and with area inside the image.

    Attributes:
        num_annotations: those that are usable, crowd regions and boxes without area among them.
        problems: what stops training, or makes it learn from wrong boxes.
        warnings: what is clipped, dropped or out of reach.
        category_names, class_counts: category id to name, and to number of objects.
        category_id_gaps: numbers between the lowest and the highest category id that are no category. They are
            allowed: each takes up one output of the class head that never occurs.
        objects_per_image, image_widths, image_heights, box_areas: spreads; sizes in pixels, areas in square pixels.
        box_scales: objects that COCO counts as small, medium and large.
    """

    image_folder: str
    annotation_file: str
    num_queries: int
    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    num_images: int = 0
    num_annotations: int = 0
    num_objects: int = 0
    num_crowd: int = 0
    num_empty_images: int = 0
    num_images_over_queries: int = 0
    category_names: dict[int, str] = field(default_factory=dict)
    category_id_gaps: list[int] = field(default_factory=list)
    class_counts: dict[int, int] = field(default_factory=dict)
    objects_per_image: Spread = Spread()
    image_widths: Spread = Spread()
    image_heights: Spread = Spread()
    box_areas: Spread = Spread()
    box_scales: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the data set can be trained on as it is; warnings do not count."""
        return not self.problems

    def render(self) -> str:
        """The report as text."""
        gaps = f", {len(self.category_id_gaps)} unused ids between them" if self.category_id_gaps else ""
        scales = ", ".join(f"{count} {name}" for name, count in self.box_scales.items())
        lines = [
            f"{self.annotation_file} with images in {self.image_folder}",
            f"  {self.num_images} images, {self.num_empty_images} without objects",
            f"  {self.num_objects} objects and {self.num_crowd} crowd regions in {self.num_annotations} annotations",
            f"  {len(self.category_names)} classes{gaps}",
            f"  objects in an image: {self.objects_per_image}; "
            f"{self.num_images_over_queries} images have more than the {self.num_queries} queries",
            f"  image width: {self.image_widths}",
            f"  image height: {self.image_heights}",
            f"  box area: {self.box_areas}; {scales}",
            *self._render_classes(),
        ]
        for title, findings in (("Problems", self.problems), ("Warnings", self.warnings)):
            lines += [title, *(finding.render() for finding in findings)] if findings else []
        return "\n".join([*lines, "No problems found." if self.ok else "This data set cannot be trained on as it is."])

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {"ok": self.ok} | asdict(self)

    def to_json(self) -> str:
        """``as_dict`` as JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def _render_classes(self) -> list[str]:
        rows = [(number, self.category_names[number], count) for number, count in self.class_counts.items()]
        width = max((len(name) for _, name, _ in rows), default=0)
        return ["Objects of each class"] + [
            f"  {number:>5}  {name:<{width}}  {count:>8}" for number, name, count in rows
        ]
