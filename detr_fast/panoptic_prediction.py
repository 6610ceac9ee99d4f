"""One image's panoptic segmentation, as ``Predictor.panoptic`` gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from detr_fast.drawing import draw_segments
from detr_fast.postprocess_masks import Segments


@dataclass(frozen=True)
class PanopticPrediction:
    """The segments of one image, each pixel in at most one of them.

    Attributes:
        ids: [height, width] int64 on the CPU, the segment of each pixel; 0 is no segment.
        segments_info: for each segment "id" (from 1 on), "category_id", "isthing", and "area" in pixels.
        names: for each segment its category's name; a category without one is called "class <id>".
    """

    ids: Tensor
    segments_info: list[dict[str, Any]]
    names: list[str]

    @staticmethod
    def of(segments: Segments, categories: Mapping[int, str]) -> PanopticPrediction:
        """Number the segments from 1 on, since COCO's format takes 0 for no segment. It waits for the device."""
        step = 1 - min((info["id"] for info in segments.segments_info), default=1)
        infos = [{**info, "id": info["id"] + step} for info in segments.segments_info]
        names = [categories.get(info["category_id"], f"class {info['category_id']}") for info in infos]
        return PanopticPrediction(segments.ids.cpu() + step, infos, names)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        height, width = self.ids.shape
        return height, width

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, image: Image.Image, *, min_size: int = 0) -> Image.Image:
        """Draw the segments with their names on a copy of ``image``; ``min_size`` as of ``draw_segments``."""
        segments = [info["id"] for info in self.segments_info]
        labels = [info["category_id"] for info in self.segments_info]
        return draw_segments(image, self.ids.numpy(), segments, labels, self.names, min_size=min_size)

    def png(self) -> bytes:
        """The segments as COCO's panoptic format has them, a PNG whose colours are ids."""
        return Segments(self.ids, self.segments_info).png()

    def to_coco(self, image_id: int, file_name: str) -> dict[str, Any]:
        """Give the entry of the "annotations" of COCO's panoptic format; ``file_name`` is that of the PNG."""
        return {"image_id": image_id, "file_name": file_name, "segments_info": self.segments_info}
