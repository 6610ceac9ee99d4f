"""Models and pictures that stand in for real ones in the tests of prediction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detr_fast import Detr, ImageBatch, Transformer


class Patches(nn.Module):
    """A backbone that sees 16 x 16 pixels a token and nothing beyond them."""

    num_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, stride=16)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return self.conv(nn.functional.pad(images, (0, -width % 16, 0, -height % 16)))


class Fixed(nn.Module):
    """A model with the same answer for each image, given as scores [Q, C] of the classes and boxes cxcywh [Q, 4]."""

    def __init__(self, scores: list[list[float]], boxes: list[list[float]]) -> None:
        super().__init__()
        probabilities = torch.tensor(scores)
        nothing = 1 - probabilities.sum(1, keepdim=True)
        self.logits = torch.cat((probabilities, nothing), 1).clamp(min=1e-9).log()
        self.boxes = torch.tensor(boxes)
        self.seen: list[ImageBatch] = []

    def forward(self, samples: ImageBatch) -> dict[str, Tensor]:
        self.seen.append(samples)
        repeat = (len(samples), 1, 1)
        return {"pred_logits": self.logits.repeat(repeat), "pred_boxes": self.boxes.repeat(repeat)}


def one_box() -> Fixed:
    return Fixed([[0.0, 0.9]], [[0.5, 0.5, 0.5, 0.25]])


def small_detr(num_layers: int = 2, *, gain: float = 3.0) -> Detr:
    transformer = Transformer(
        d_model=16,
        nhead=2,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        dim_feedforward=16,
        return_intermediate_dec=True,
    )
    model = Detr(Patches(), transformer, num_classes=5, num_queries=7)
    # With random weights as they come (gain 1) all attention is nearly even.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.randint(0, 256, (height, width, 3), dtype=np.uint8))


def tiny_args(**changes: Any) -> SimpleNamespace:
    sizes = {"hidden_dim": 16, "nheads": 2, "enc_layers": 1, "dec_layers": 1, "dim_feedforward": 16, "num_queries": 5}
    return SimpleNamespace(**({"backbone": "tiny", "num_classes": 4} | sizes | changes))
