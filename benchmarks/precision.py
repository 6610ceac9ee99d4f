"""What fewer bits cost a trained model in average precision of boxes.

    python -m benchmarks.precision --checkpoint demo/checkpoint.pth --images demo/val/images \
        --annotations demo/val/instances_val.json --output results.json

``optimize`` in bfloat16 computes ResNets and the transformer in it, autocast every layer; in 8-bit integers it computes
a ResNet's convolutions, calibrated on training images (``--calibration``). Of any backbone they are simulated: weights
of convolutions are rounded to 255 steps for each channel, their inputs to 255 for each map. Nothing is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detr_fast import PostProcess, optimize
from detr_fast.build import model_from_checkpoint
from detr_fast.data.batch import ImageBatch, collate
from detr_fast.data.coco import CocoDetection
from detr_fast.data.find import find_images
from detr_fast.data.images import load_image
from detr_fast.data.transforms import eval_transforms
from detr_fast.evaluate import CocoEvaluator, evaluate
from detr_fast.optimize import optimizes

CALIBRATION_IMAGES = 32


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "images", "annotations", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="folder of training images, the first 32 of which are used")
    parser.add_argument("--size", type=int, default=96, help="the checkpoint's image size")
    options = parser.parse_args()
    model, _ = model_from_checkpoint(options.checkpoint)
    found = compared(model, options)
    print(json.dumps(found, indent=2))
    options.output.write_text(json.dumps(found, indent=2) + "\n")


def compared(model: nn.Module, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every way's AP and AP50."""
    found = {
        "float32": measured(model, options),
        "optimize in bfloat16": measured(optimize(model, dtype=torch.bfloat16), options),
        "bfloat16 autocast": measured(model, options, amp=True),
        "convolutions in int8, simulated": measured(with_rounded_convolutions(model), options),
    }
    if optimizes(model) and options.calibration is not None:
        images = ImageBatch.of(_calibration_images(options.calibration, options.size))
        found["optimize in int8"] = measured(optimize(model, dtype=torch.int8, calibration=images), options)
    return found


def _calibration_images(folder: Path, size: int) -> list[Tensor]:
    transform = eval_transforms(size, size)
    return [transform(load_image(path), {})[0] for path in find_images(folder)[:CALIBRATION_IMAGES]]


def measured(model: nn.Module, options: argparse.Namespace, *, amp: bool = False) -> dict[str, float]:
    """AP and AP50 of boxes."""
    dataset = CocoDetection(options.images, options.annotations, eval_transforms(options.size, options.size))
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=8, collate_fn=collate)
    evaluator = CocoEvaluator(options.annotations)
    result, _ = evaluate(
        model, loader, postprocess=PostProcess(), evaluator=evaluator, device="cpu", amp=amp, optimized=False
    )
    return {name: round(result.stats[name], 4) for name in ("AP", "AP50")}


def with_rounded_convolutions(model: nn.Module) -> nn.Module:
    """A copy whose convolutions take weights and maps of 8 bits."""
    rounded = copy.deepcopy(model)
    for layer in rounded.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = _rounded(layer.weight.data, (1, 2, 3))
            layer.register_forward_pre_hook(lambda _, arguments: (_rounded(arguments[0], (1, 2, 3)), *arguments[1:]))
    return rounded


def _rounded(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """To 255 steps from minus the largest number over ``dims`` to it."""
    step = (x.abs().amax(dims, keepdim=True) / 127).clamp_min(1e-30)
    return (x / step).round() * step


if __name__ == "__main__":
    main()
