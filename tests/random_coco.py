"""Ground truth and detections for COCO AP: random ones, and what pycocotools says about them."""

from __future__ import annotations

import contextlib
import io
import json
import random
from typing import Any

import numpy as np
import torch
from pycocotools import mask as pycocotools_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

Prediction = dict[str, Tensor]


def by_image(results: list[dict[str, Any]], image_ids: list[int], sizes: dict[int, tuple[int, int]]) -> Any:
    """Detections in COCO result format as an evaluator takes them."""
    predictions: dict[int, Prediction] = {}
    for image_id in image_ids:
        found = [entry for entry in results if entry["image_id"] == image_id]
        masks = [pycocotools_mask.decode(entry["segmentation"]) for entry in found if "segmentation" in entry]
        boxes = torch.tensor([entry.get("bbox", [0, 0, 0, 0]) for entry in found], dtype=torch.float64).reshape(-1, 4)
        predictions[image_id] = {
            "scores": torch.tensor([entry["score"] for entry in found], dtype=torch.float64),
            "labels": torch.tensor([entry["category_id"] for entry in found], dtype=torch.int64),
            "boxes": torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1),
            "masks": torch.from_numpy(np.array(masks, dtype=np.uint8).reshape(-1, *sizes[image_id])),
        }
    return predictions


def sizes_of(contents: dict[str, Any]) -> dict[int, tuple[int, int]]:
    return {image["id"]: (image["height"], image["width"]) for image in contents["images"]}


def reference_stats(contents: dict[str, Any], results: list[dict[str, Any]], iou_type: str) -> list[float]:
    """The twelve numbers of pycocotools, over all images."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = json.loads(json.dumps(contents))
        ground_truth.createIndex()
        reference = COCOeval(ground_truth, ground_truth.loadRes(json.loads(json.dumps(results))), iou_type)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    return list(reference.stats)


def random_ground_truth() -> dict[str, Any]:
    """Objects of all sizes, crowds among them, in 12 images with gaps between ids; one image stays empty."""
    image_ids = random.sample(range(1, 10**12), 12)
    category_ids = sorted(random.sample(range(1, 90), 4))
    images = [{"id": number, "file_name": "", "width": 160, "height": 130} for number in image_ids]
    annotations = []
    for number in range(1, 81):
        width, height = random.choice([8, 20, 50, 110]) * random.uniform(0.7, 1), random.uniform(8, 110)
        x, y = random.uniform(0, 160 - width), random.uniform(0, 130 - height)
        annotation = {
            "id": number,
            "image_id": random.choice(image_ids[1:]),
            "category_id": random.choice(category_ids),
        }
        annotation |= {"bbox": [x, y, width, height], "iscrowd": int(random.random() < 0.1)}
        annotation |= {"segmentation": ellipse(annotation["bbox"])}
        annotation["area"] = float(pycocotools_mask.area(annotation["segmentation"]))
        annotations.append(annotation)
    categories = [{"id": number, "name": f"class {number}"} for number in category_ids]
    return {"images": images, "annotations": annotations, "categories": categories}


def ellipse(bbox: list[float]) -> dict[str, Any]:
    x, y, width, height = bbox
    rows, columns = np.mgrid[0:130, 0:160]
    inside = ((columns - x - width / 2) / (width / 2)) ** 2 + ((rows - y - height / 2) / (height / 2)) ** 2 <= 1
    encoded = pycocotools_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def random_results(contents: dict[str, Any]) -> list[dict[str, Any]]:
    """Most objects, moved and sometimes of another class, and boxes where nothing is."""
    results = []
    for annotation in random.choices(contents["annotations"], k=150):
        bbox = [max(0.5, value + random.gauss(0, 0.06 * max(annotation["bbox"][2:]))) for value in annotation["bbox"]]
        category_id = annotation["category_id"]
        if random.random() < 0.2:
            category_id = random.choice(contents["categories"])["id"]
        result = {"image_id": annotation["image_id"], "category_id": category_id, "bbox": bbox}
        # Scores of two decimals, so that many are equal.
        results.append(result | {"score": round(random.random(), 2), "segmentation": ellipse(bbox)})
    return results


def without(results: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != key} for entry in results]
