"""What training tests share: pictures with boxes in COCO format, samples in memory, and a tiny configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small import random_boxes
from torch import Tensor
from torch.utils.data import DataLoader

from detr_fast.config import ModelConfig, OptimConfig, TrainConfig
from detr_fast.data.batch import collate

NAMES = {1: "red", 3: "green"}
SMALL_MODEL = ModelConfig(
    backbone="tiny", hidden_dim=16, nheads=2, enc_layers=1, dec_layers=2, dim_feedforward=16, num_queries=5
)


def samples(counts: list[int], side: int = 32, num_classes: int = 5) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """An image of noise with so many random objects for each count; ids are 100, 101, ..."""
    return [
        (
            torch.randn(3, side, side),
            {
                "labels": torch.randint(num_classes, (count,)),
                "boxes": random_boxes(count),
                "image_id": torch.tensor([100 + index]),
            },
        )
        for index, count in enumerate(counts)
    ]


def loader(data: list[tuple[Tensor, dict[str, Tensor]]], batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(data, batch_size, collate_fn=collate)  # type: ignore[arg-type]


def write_coco(folder: Path, count: int = 6, names: dict[int, str] = NAMES) -> tuple[Path, Path]:
    """``count`` pictures of 48 x 40 pixels, the first without objects: (image folder, annotation file)."""
    from PIL import Image  # on demand: samples, and what is tested with them on a GPU, do without it

    folder.mkdir(parents=True)
    random = np.random.default_rng(count)
    images, annotations = [], []
    for index in range(count):
        Image.fromarray(random.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        images.append({"id": index + 10, "file_name": f"{index}.png", "height": 40, "width": 48})
        for number in range(index % 4):
            box = [4 + 5 * number, 3 + 2 * index, 12, 9]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 10,
                    "category_id": sorted(names)[number % len(names)],
                    "bbox": box,
                    "area": 108,
                    "iscrowd": 0,
                }
            )
    contents = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in names.items()],
    }
    (folder / "instances.json").write_text(json.dumps(contents))
    return folder, folder / "instances.json"


def config(tmp_path: Path, *, optim: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """A run of seconds on ``write_coco``'s pictures under ``tmp_path``; the output folder is ``tmp_path / "out"``."""
    for name, count in (("train", 6), ("val", 4)):
        if not (tmp_path / name).exists():
            write_coco(tmp_path / name, count)
    settings: dict[str, Any] = {
        "train_images": tmp_path / "train",
        "train_annotations": tmp_path / "train" / "instances.json",
        "val_images": tmp_path / "val",
        "val_annotations": tmp_path / "val" / "instances.json",
        "output_dir": tmp_path / "out",
        "model": SMALL_MODEL,
        "optim": OptimConfig(**{"epochs": 2, "lr": 1e-3, **(optim or {})}),
        "scales": (32, 48),
        "max_size": 64,
        "num_workers": 0,
        "device": "cpu",
        "log_every": 1,
    }
    return TrainConfig(**{**settings, **changes})
