"""Pascal-VOC annotations as COCO ones: the blood cell data set comes as one XML file an image."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def voc_to_coco(folder: Path) -> dict[str, Any]:
    """One COCO dictionary of all XML files of ``folder``; boxes without area stay in, for the loader to drop."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    category_ids: dict[str, int] = {}
    for image_id, path in enumerate(sorted(folder.glob("*.xml")), start=1):
        root = ElementTree.parse(path).getroot()
        images.append(_image(root, image_id, path.with_suffix(".jpg").name))
        for entry in root.iter("object"):
            category_id = category_ids.setdefault(entry.findtext("name", ""), len(category_ids) + 1)
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
            annotations.append(annotation | _box(entry))
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _image(root: ElementTree.Element, image_id: int, file_name: str) -> dict[str, Any]:
    width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
    return {"id": image_id, "file_name": file_name, "width": width, "height": height}


def _box(entry: ElementTree.Element) -> dict[str, Any]:
    x0, y0, x1, y1 = (float(entry.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax"))
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
