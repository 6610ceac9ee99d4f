"""The models of the paper, as functions that show every number."""

from __future__ import annotations

import os

from torch import nn

from detr_fast.checkpoint import WithoutRandomWeights, load_checkpoint, load_weights
from detr_fast.models.backbone import Backbone, FeatureBackbone, Joiner, TinyConvNet
from detr_fast.models.detr import Detr
from detr_fast.models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from detr_fast.models.segmentation import DetrSegm
from detr_fast.models.transformer import Transformer

PathLike = str | os.PathLike[str]


def build_backbone(
    name: str,
    *,
    hidden_dim: int = 256,
    position_embedding: str = "sine",
    train_backbone: bool = True,
    return_interm_layers: bool = False,
    dilation: bool = False,
) -> Joiner:
    """A named backbone with its position encoding.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101", or "tiny" (``TinyConvNet``, to train from scratch).
        hidden_dim: the transformer's width.
        position_embedding: "sine" or "learned".
        train_backbone: False freezes all of it.
        return_interm_layers, dilation: of ``Backbone``; "tiny" has no dilation, and maps from half the size on.

    Raises:
        ValueError: a name is unknown, or ``name`` has no such option.
    """
    position: nn.Module
    if position_embedding == "sine":
        position = PositionEmbeddingSine(hidden_dim // 2, normalize=True)
    elif position_embedding == "learned":
        position = PositionEmbeddingLearned(hidden_dim // 2)
    else:
        raise ValueError(f"position_embedding must be 'sine' or 'learned', got {position_embedding!r}")
    if name != "tiny":
        return Joiner(Backbone(name, train_backbone, return_interm_layers, dilation), position)
    if dilation:
        raise ValueError("the backbone 'tiny' has no dilation")
    body = TinyConvNet().requires_grad_(train_backbone)
    return Joiner(FeatureBackbone(body, return_interm_layers=return_interm_layers), position)


def detr_resnet50(num_classes: int = 91, pretrained: PathLike | None = None, *, aux_loss: bool = False) -> Detr:
    """DETR with ResNet-50: 42.0 AP on COCO with the published weights (Carion et al. 2020, table 1).

    Args:
        num_classes: one more than the largest label.
        pretrained: a checkpoint to load; a class head of another size is an error.
        aux_loss: return the earlier decoder layers' outputs too, for training.
    """
    return _detr("resnet50", False, num_classes, pretrained, aux_loss)


def detr_resnet50_dc5(num_classes: int = 91, pretrained: PathLike | None = None, *, aux_loss: bool = False) -> Detr:
    """``detr_resnet50`` with a dilated last stage, twice the resolution: 43.3 AP (table 1)."""
    return _detr("resnet50", True, num_classes, pretrained, aux_loss)


def detr_resnet101(num_classes: int = 91, pretrained: PathLike | None = None, *, aux_loss: bool = False) -> Detr:
    """``detr_resnet50`` with ResNet-101: 43.5 AP (table 1)."""
    return _detr("resnet101", False, num_classes, pretrained, aux_loss)


def detr_resnet101_dc5(num_classes: int = 91, pretrained: PathLike | None = None, *, aux_loss: bool = False) -> Detr:
    """``detr_resnet101`` with a dilated last stage: 44.9 AP (table 1)."""
    return _detr("resnet101", True, num_classes, pretrained, aux_loss)


def detr_resnet50_panoptic(
    num_classes: int = 250, pretrained: PathLike | None = None, *, aux_loss: bool = False
) -> DetrSegm:
    """``detr_resnet50`` with the mask head: 43.4 PQ on COCO panoptic with the published weights (table 5).

    Args:
        num_classes, pretrained, aux_loss: as of ``detr_resnet50``. COCO's panoptic ids end at 200; the published
            weights have 250 classes.
    """
    return _panoptic("resnet50", False, num_classes, pretrained, aux_loss)


def detr_resnet50_dc5_panoptic(
    num_classes: int = 250, pretrained: PathLike | None = None, *, aux_loss: bool = False
) -> DetrSegm:
    """``detr_resnet50_panoptic`` with a dilated last stage: 44.6 PQ (table 5)."""
    return _panoptic("resnet50", True, num_classes, pretrained, aux_loss)


def detr_resnet101_panoptic(
    num_classes: int = 250, pretrained: PathLike | None = None, *, aux_loss: bool = False
) -> DetrSegm:
    """``detr_resnet50_panoptic`` with ResNet-101: 45.1 PQ (table 5)."""
    return _panoptic("resnet101", False, num_classes, pretrained, aux_loss)


def _detr(backbone: str, dilation: bool, num_classes: int, pretrained: PathLike | None, aux_loss: bool) -> Detr:
    if pretrained is None:
        return _assemble(backbone, dilation, num_classes, aux_loss, return_interm_layers=False)
    with WithoutRandomWeights():
        model = _detr(backbone, dilation, num_classes, None, aux_loss)
    load_weights(model, load_checkpoint(pretrained)["model"])
    return model


def _panoptic(backbone: str, dilation: bool, num_classes: int, pretrained: PathLike | None, aux_loss: bool) -> DetrSegm:
    if pretrained is None:
        return DetrSegm(_assemble(backbone, dilation, num_classes, aux_loss, return_interm_layers=True))
    with WithoutRandomWeights():
        model = _panoptic(backbone, dilation, num_classes, None, aux_loss)
    load_weights(model, load_checkpoint(pretrained)["model"])
    return model


def _assemble(backbone: str, dilation: bool, num_classes: int, aux_loss: bool, *, return_interm_layers: bool) -> Detr:
    transformer = Transformer(
        d_model=256,
        nhead=8,
        num_encoder_layers=6,
        num_decoder_layers=6,
        dim_feedforward=2048,
        dropout=0.1,
        return_intermediate_dec=True,
    )
    joiner = build_backbone(backbone, hidden_dim=256, dilation=dilation, return_interm_layers=return_interm_layers)
    return Detr(joiner, transformer, num_classes=num_classes, num_queries=100, aux_loss=aux_loss)
