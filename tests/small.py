"""Small models and random targets that several tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import (
    Detr,
    DetrSegm,
    HungarianMatcher,
    ImageBatch,
    Joiner,
    PositionEmbeddingSine,
    SetCriterion,
    Transformer,
)
from detr_fast.models.backbone import with_mask


class PatchBackbone(nn.Module):
    """The smallest backbone: one convolution of stride 16."""

    num_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, self.num_channels, 16, stride=16)

    def forward(self, images: Tensor) -> Tensor:
        return self.patch(images)


def small_detr(num_classes: int = 5, num_queries: int = 7, *, dropout: float = 0.0, **transformer_options) -> Detr:
    transformer = Transformer(
        d_model=16,
        nhead=2,
        num_encoder_layers=2,
        num_decoder_layers=3,
        dim_feedforward=32,
        dropout=dropout,
        return_intermediate_dec=True,
        **transformer_options,
    )
    return Detr(PatchBackbone(), transformer, num_classes, num_queries, aux_loss=True)


class PatchPyramid(PatchBackbone):
    """The patches at four sizes, as a mask head needs them."""

    def forward(self, samples: ImageBatch) -> list[ImageBatch]:
        patches = self.patch(samples.tensors)
        return [with_mask(F.interpolate(patches, scale_factor=scale), samples) for scale in (8.0, 4.0, 2.0, 1.0)]


def small_segm(chunk: int = 2) -> DetrSegm:
    """``small_detr`` with a mask head."""
    detr = small_detr()
    detr.backbone = Joiner(PatchPyramid(), PositionEmbeddingSine(8, normalize=True))
    return DetrSegm(detr, chunk=chunk, fpn_dims=[PatchBackbone.num_channels] * 3)


def small_criterion(num_classes: int = 5, *, masks: bool = False, **options) -> SetCriterion:
    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    losses = ["labels", "boxes", "cardinality"]
    if masks:
        weights, losses = {**weights, "loss_mask": 1.0, "loss_dice": 1.0}, [*losses, "masks"]
    return SetCriterion(num_classes, HungarianMatcher(1, 5, 2), weights, 0.1, losses, **options)


def random_boxes(count: int) -> Tensor:
    """[count, 4] cxcywh inside the image."""
    size = 0.05 + 0.4 * torch.rand(count, 2)
    return torch.cat((size / 2 + torch.rand(count, 2) * (1 - size), size), 1)


def random_targets(counts: list[int], num_classes: int = 5) -> list[dict[str, Tensor]]:
    return [{"labels": torch.randint(num_classes, (count,)), "boxes": random_boxes(count)} for count in counts]


def random_outputs(batch: int, num_queries: int = 7, num_classes: int = 5) -> dict[str, Tensor]:
    boxes = torch.stack([random_boxes(num_queries) for _ in range(batch)])
    return {"pred_logits": torch.randn(batch, num_queries, num_classes + 1), "pred_boxes": boxes}
