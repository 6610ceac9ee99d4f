"""What fewer bits cost a trained ResNet in average precision: the demo's digits, found by a DETR on a narrow ResNet-18.

    python -m benchmarks.precision_resnet --minutes 25 --output DIRECTORY

The demo's own backbone is no ResNet, whose stride of 32 leaves nine cells of its pictures. So this one, of a quarter of
a ResNet-18's channels, has ordinary batch norms, as it starts from nothing, and takes the pictures enlarged by 5/3.
The training is the demo's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.precision import compared
from detr_fast import demo
from detr_fast.build import model_from_args
from detr_fast.models.backbone import BasicBlock, ResNet


class EnlargedResNet(nn.Module):
    """A ResNet-18 of 16 to 128 channels that takes pictures enlarged."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet(BasicBlock, (2, 2, 2, 2), norm=nn.BatchNorm2d, width=16)
        self.num_channels = self.resnet.stage_channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 128, 5 H / 96, 5 W / 96]."""
        last: Tensor = self.resnet(F.interpolate(images, scale_factor=5 / 3, mode="bilinear"))[-1]
        return last


def model_of(args: SimpleNamespace) -> nn.Module:
    """The demo's model on that backbone, which has as many channels as its own."""
    model: nn.Module = model_from_args(args)
    model.backbone[0].body = EnlargedResNet()  # type: ignore[index,union-attr]
    return model


def main() -> None:
    """Train, measure, print and write ``precision.json`` beside the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder; what holds a checkpoint is not trained")
    parser.add_argument("--minutes", type=float, default=25.0, help="of training")
    options = parser.parse_args()
    checkpoint = options.output / demo.CHECKPOINT
    if not checkpoint.exists():
        # The demo offers no other backbone, and nothing else of it changes.
        demo.model_from_args = model_of  # type: ignore[assignment]
        demo.run_demo(options.minutes, options.output)
    contents = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = model_of(SimpleNamespace(**contents["args"]))
    model.load_state_dict(contents["model"])
    data = {"images": options.output / "val" / "images", "annotations": options.output / "val" / "instances_val.json"}
    settings = argparse.Namespace(size=demo.SIZE, calibration=options.output / "train" / "images", **data)
    found = {"updates": contents["step"], **compared(model, settings)}
    print(json.dumps(found, indent=2))
    (options.output / "precision.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
