"""What the options of ``detr-fast predict`` ask of ``optimize``."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from detr_fast.data.find import Inputs, find_images_and_videos
from detr_fast.data.images import ImageError, load_image

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
CALIBRATION_IMAGES = 8


def optimize_options(
    optimized: bool, *, cuda_graph: bool, device: str, dtype: str, images: Inputs
) -> bool | dict[str, Any]:
    """What ``Predictor`` takes as ``optimized``.

    Args:
        optimized: run an optimised copy.
        cuda_graph: as CUDA graphs.
        device: where it runs.
        dtype: "float32", "bfloat16" or "int8".
        images: the first ones that can be read calibrate int8.

    Raises:
        ValueError: two of them do not fit together, ``dtype`` is another one, or no image can be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not optimized and dtype != "float32":
        raise ValueError("dtype must be float32 with not-optimized: only the optimised copy computes in fewer bits")
    if not optimized and cuda_graph:
        raise ValueError("cuda-graph must be used without not-optimized: it is the optimised copy that has graphs")
    if cuda_graph and not device.startswith("cuda"):
        raise ValueError(f"cuda-graph needs a CUDA device, got {device}")
    options: dict[str, Any] = {"cuda_graph": True} if cuda_graph else {}
    if dtype != "float32":
        options["dtype"] = DTYPES[dtype]
    if dtype == "int8":
        options["calibration"] = _calibration_pictures(images)
    return options or optimized


def _calibration_pictures(inputs: Inputs) -> list[Any]:
    pictures: list[Any] = []
    for path in find_images_and_videos(inputs)[0]:
        # The run itself says which images cannot be read.
        with suppress(ImageError):
            pictures.append(load_image(path))
        if len(pictures) == CALIBRATION_IMAGES:
            break
    if not pictures:
        raise ValueError(f"calibration must name images that can be read for dtype int8, got none in {inputs}")
    return pictures
