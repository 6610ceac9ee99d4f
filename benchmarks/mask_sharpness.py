"""What ``sharp_masks`` is worth against plain upsampling: for a trained model, and for true masks made small.

    python -m benchmarks.mask_sharpness --checkpoint demo/checkpoint.pth --images demo/val/images \
        --annotations demo/val/instances_val.json --coco ../shared/data/coco200 --output results.json

The true masks are COCO's panoptic segments, averaged over squares of 4 x 4 pixels, as they are or blurred as a
network's are; their quality is what post-processing leaves of it. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import PostProcessPanoptic
from detr_fast.data.coco_panoptic import CocoPanoptic
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from detr_fast.evaluate import evaluate_checkpoint
from detr_fast.panoptic_evaluator import PanopticEvaluator
from detr_fast.sharp_masks import with_sharp_masks

# Standard deviations of the blur, in logits' distances.
BLURS = (0.0, 1.5)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "images", "annotations", "coco", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96, help="the checkpoint's image size")
    parser.add_argument("--every", type=int, default=1, help="take every so many of COCO's images")
    options = parser.parse_args()
    found: dict[str, object] = {"trained": trained(options)}
    for blur in BLURS:
        found[f"COCO, blur {blur:g}"] = dict(
            zip(("plain", "sharp"), true_masks(options.coco, blur, options.every), strict=True)
        )
    print(json.dumps(found, indent=2))
    options.output.write_text(json.dumps(found, indent=2) + "\n")


def trained(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """AP of the masks of a checkpoint, plain and sharp."""
    results = {}
    for name, sharp in (("plain", False), ("sharp", True)):
        result = evaluate_checkpoint(
            *(options.checkpoint, options.images, options.annotations),
            size=options.size,
            max_size=options.size,
            masks=True,
            sharp_masks=sharp,
            num_workers=0,
        )
        results[name] = {key: result.stats[key] for key in ("AP", "AP50", "AP75")}  # type: ignore[attr-defined]
    return results


def true_masks(folder: Path, blur: float, every: int) -> Iterator[dict[str, float]]:
    """Panoptic quality of COCO's true masks that have gone through a quarter of the size: plain, then sharp."""
    annotations = folder / "annotations"
    contents = json.loads((annotations / "panoptic_val2017.json").read_text())
    chosen = {image["id"] for image in sorted(contents["images"], key=lambda image: image["id"])[::every]}
    contents["images"] = [image for image in contents["images"] if image["id"] in chosen]
    contents["annotations"] = [entry for entry in contents["annotations"] if entry["image_id"] in chosen]
    data = CocoPanoptic(folder / "images" / "val2017", annotations / "panoptic_val2017", contents)
    for sharp in (False, True):
        evaluator = PanopticEvaluator(contents, annotations / "panoptic_val2017")
        postprocess = PostProcessPanoptic(evaluator.is_thing_map)
        for picture, target in data:
            pixels = torch.tensor(bytearray(picture.tobytes()), dtype=torch.uint8).view(
                picture.height, picture.width, 3
            )
            image = ((pixels / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(2, 0, 1)
            outputs = perfect_outputs(target["masks"], target["labels"], blur)
            outputs = with_sharp_masks(outputs, image[None]) if sharp else outputs
            (segments,) = postprocess(outputs, [(picture.height, picture.width)])
            evaluator.update({int(target["image_id"]): segments})
        stats = evaluator.summarize().stats
        yield {key: stats[key] for key in ("PQ", "SQ", "RQ")}


def perfect_outputs(masks: Tensor, labels: Tensor, blur: float) -> dict[str, Tensor]:
    """What a detector without fault puts out, but for the size of its masks."""
    logits = torch.full((1, len(masks), 202), -20.0)
    logits[0, range(len(masks)), labels] = 20
    size = [-(-side // 4) for side in masks.shape[1:]]
    coverage = F.adaptive_avg_pool2d(masks[None].float(), size)[0]
    if blur:
        steps = torch.arange(-5.0, 6)
        kernel = torch.exp(-(steps**2) / (2 * blur**2))
        kernel = (kernel[:, None] * kernel / kernel.sum() ** 2)[None, None]
        coverage = F.conv2d(F.pad(coverage[:, None], (5, 5, 5, 5), mode="replicate"), kernel)[:, 0]
    return {"pred_logits": logits, "pred_masks": torch.logit(coverage.clamp(0.01, 0.99))[None]}


if __name__ == "__main__":
    main()
