"""Puts models together: from the original's argument namespace, or from a checkpoint."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.checkpoint import CheckpointError, WithoutRandomWeights, load_checkpoint, load_weights
from detr_fast.config import LossConfig, ModelConfig, OptimConfig
from detr_fast.criterion import SetCriterion
from detr_fast.matcher import HungarianMatcher
from detr_fast.models.detr import Detr
from detr_fast.models.presets import build_backbone
from detr_fast.models.segmentation import DetrSegm
from detr_fast.models.transformer import Transformer
from detr_fast.postprocess import PostProcess
from detr_fast.postprocess_masks import PostProcessPanoptic, PostProcessSegm

# torchvision's IMAGENET1K_V1 weights, those the original starts from; the file name ends in its hash.
IMAGENET_URLS = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}

# COCO's panoptic categories: things up to 90, stuff from there on up to 200. The published models have 250 classes.
COCO_THINGS = {number: number <= 90 for number in range(201)}
PANOPTIC_CLASSES = 250

# The original's defaults, for what a namespace or a checkpoint does not say.
DEFAULTS: dict[str, Any] = {
    **asdict(ModelConfig()),
    **asdict(LossConfig()),
    "lr_backbone": OptimConfig().lr_backbone,
    "masks": False,
    "frozen_weights": None,
    "dataset_file": "coco",
    "device": "cpu",
}


def build_model(args: Any) -> tuple[Detr | DetrSegm, SetCriterion, dict[str, nn.Module]]:
    """Model, criterion and post-processors for the original's argument namespace.

    Beyond the original's names, ``args.num_classes`` gives the number of classes, and ``args.backbone_weights`` where
    the backbone starts: "imagenet" (as in the original; the default), a file of torchvision's weights, or "none".

    Args:
        args: any object with the original's attributes; what it lacks has the original's default.

    Returns:
        The model, the criterion (moved to ``args.device``), and the post-processors by their names: "bbox", with
        masks "segm", and for the data set "coco_panoptic" also "panoptic".

    Raises:
        ValueError: an option has no such value.
        CheckpointError: the file of backbone weights cannot be read.

    Warns:
        UserWarning: the ImageNet weights cannot be had, and the backbone starts from random ones.
    """
    options = _options(args)
    model = model_from_args(options)
    weights = getattr(args, "backbone_weights", "imagenet")
    if weights == "imagenet" and options.backbone in IMAGENET_URLS:
        try:
            load_backbone_weights(model, options.backbone, weights)
        except CheckpointError as error:
            warnings.warn(f"{error}; the backbone starts from random weights", stacklevel=2)
    elif weights not in ("none", "imagenet"):
        load_backbone_weights(model, options.backbone, weights)
    criterion = criterion_from_args(options)
    return model, criterion.to(options.device), postprocessors_from_args(options)


def model_from_args(args: Any) -> Detr | DetrSegm:
    """The model alone, with random weights; ``args`` as in ``build_model``."""
    options = _options(args)
    backbone = build_backbone(
        options.backbone,
        hidden_dim=options.hidden_dim,
        position_embedding=options.position_embedding,
        train_backbone=options.lr_backbone > 0,
        return_interm_layers=options.masks,
        dilation=options.dilation,
    )
    transformer = Transformer(
        d_model=options.hidden_dim,
        nhead=options.nheads,
        num_encoder_layers=options.enc_layers,
        num_decoder_layers=options.dec_layers,
        dim_feedforward=options.dim_feedforward,
        dropout=options.dropout,
        normalize_before=options.pre_norm,
        return_intermediate_dec=True,
        activation_checkpointing=options.activation_checkpointing,
    )
    detr = Detr(backbone, transformer, options.num_classes, options.num_queries, options.aux_loss)
    return DetrSegm(detr, freeze_detr=options.frozen_weights is not None) if options.masks else detr


def criterion_from_args(args: Any) -> SetCriterion:
    """Matcher, loss weights (the same at every decoder layer) and criterion; ``args`` as in ``build_model``."""
    options = _options(args)
    matcher = HungarianMatcher(options.set_cost_class, options.set_cost_bbox, options.set_cost_giou)
    weights = {"loss_ce": 1.0, "loss_bbox": options.bbox_loss_coef, "loss_giou": options.giou_loss_coef}
    if options.masks:
        weights |= {"loss_mask": options.mask_loss_coef, "loss_dice": options.dice_loss_coef}
    layers = range(options.dec_layers - 1) if options.aux_loss else ()
    weight_dict = weights | {f"{name}_{layer}": weight for layer in layers for name, weight in weights.items()}
    return SetCriterion(
        options.num_classes,
        matcher=matcher,
        weight_dict=weight_dict,
        eos_coef=options.eos_coef,
        losses=["labels", "boxes", "cardinality", *(["masks"] if options.masks else [])],
    )


def postprocessors_from_args(args: Any) -> dict[str, nn.Module]:
    """What ``build_model`` returns last; ``args`` as there."""
    options = _options(args)
    postprocessors: dict[str, nn.Module] = {"bbox": PostProcess()}
    if options.masks:
        postprocessors["segm"] = PostProcessSegm()
        if options.dataset_file == "coco_panoptic":
            postprocessors["panoptic"] = PostProcessPanoptic(COCO_THINGS)
    return postprocessors


def load_backbone_weights(model: Detr | DetrSegm, name: str, weights: str | os.PathLike[str] = "imagenet") -> None:
    """Start the backbone of ``model`` from a classifier's weights.

    Args:
        model: a model whose backbone is one of ``build_backbone``'s.
        name: the backbone's name.
        weights: "imagenet", torchvision's ImageNet weights, downloaded to torch.hub's cache on first use; or a file
            with torchvision's parameter names, whose classifier (``fc``) is left out.

    Raises:
        CheckpointError: the weights cannot be had, or belong to another network.
    """
    state_dict = _download(name) if weights == "imagenet" else load_checkpoint(weights)["model"]
    body = {key: value for key, value in state_dict.items() if not key.startswith("fc.")}
    detr = model.detr if isinstance(model, DetrSegm) else model
    load_weights(detr.backbone[0].body, body)  # type: ignore[index,union-attr]


def _download(name: str) -> dict[str, Tensor]:
    if name not in IMAGENET_URLS:
        raise CheckpointError(f"there are no ImageNet weights for the backbone {name!r}")
    url = IMAGENET_URLS[name]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no space, another hash
        raise CheckpointError(f"cannot download ImageNet weights for {name} from {url}: {error}") from error


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says besides weights.

    Attributes:
        categories: category id to name; empty where the file has none.
        is_thing_map: category id to whether it is a thing (True) or stuff; COCO's for a model with COCO's 250 panoptic
            classes that does not say it; else empty where the file has none.
        args: the original's option names and the values the model was built with.
    """

    categories: dict[int, str] = field(default_factory=dict)
    is_thing_map: dict[int, bool] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)


def model_from_checkpoint(path: str | os.PathLike[str], **overrides: Any) -> tuple[Detr | DetrSegm, CheckpointMeta]:
    """Rebuild a model from its checkpoint alone: one of ours, or one of the original's.

    The architecture is read off the parameters' shapes. What shapes do not tell (``nheads``, ``dilation``) comes from
    the file's own arguments or else is the original's default; ``overrides`` go before both (a published DC5
    checkpoint needs ``dilation=True``). Averaged weights (EMA) are preferred where the file has them.

    Returns:
        The model in eval mode, and what the file says besides.

    Raises:
        CheckpointError: the file cannot be read, or is not a DETR's.
    """
    checkpoint = load_checkpoint(path)
    state_dict = checkpoint.get("ema") or checkpoint["model"]
    # Nothing is frozen in a model that is loaded, whatever it was trained with.
    args = DEFAULTS | checkpoint["args"] | _read_architecture(state_dict, path) | {"frozen_weights": None} | overrides
    with WithoutRandomWeights():
        model = model_from_args(SimpleNamespace(**args))
    load_weights(model, state_dict)
    categories = {int(key): str(name) for key, name in (checkpoint.get("categories") or {}).items()}
    return model.eval(), CheckpointMeta(categories, _things(checkpoint, args["num_classes"]), args)


def _things(checkpoint: Mapping[str, Any], num_classes: int) -> dict[int, bool]:
    things = checkpoint.get("is_thing_map")
    if things is None and num_classes == PANOPTIC_CLASSES and not checkpoint.get("categories"):
        return dict(COCO_THINGS)
    return {int(key): bool(value) for key, value in (things or {}).items()}


def _read_architecture(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options that parameter names and shapes give away."""
    if any(key.startswith("mask_head.") for key in state_dict):  # a DetrSegm, whose detector is under "detr."
        detector = {key.removeprefix("detr."): value for key, value in state_dict.items() if key.startswith("detr.")}
        architecture = {**_read_architecture(detector, path), "masks": True}
        # The head's first layer sees the hidden size and an attention map for each head.
        return {**architecture, "nheads": len(state_dict["mask_head.lay1.bias"]) - architecture["hidden_dim"]}
    try:
        num_queries, hidden_dim = state_dict["query_embed.weight"].shape
        return {
            "num_queries": num_queries,
            "hidden_dim": hidden_dim,
            "num_classes": len(state_dict["class_embed.bias"]) - 1,
            "enc_layers": _count(state_dict, r"transformer\.encoder\.layers\.(\d+)\."),
            "dec_layers": _count(state_dict, r"transformer\.decoder\.layers\.(\d+)\."),
            "dim_feedforward": len(state_dict["transformer.decoder.layers.0.linear1.bias"]),
            "pre_norm": "transformer.encoder.norm.weight" in state_dict,
            "position_embedding": "learned" if "backbone.1.row_embed.weight" in state_dict else "sine",
            "backbone": _backbone_name(state_dict),
            "masks": False,
        }
    except KeyError as error:
        raise CheckpointError(f"{path} is not a DETR checkpoint: it has no {error}") from None


def _backbone_name(state_dict: Mapping[str, Tensor]) -> str:
    if "backbone.0.body.stem.weight" in state_dict:
        return "tiny"
    bottleneck = "backbone.0.body.layer1.0.conv3.weight" in state_dict
    depth = _count(state_dict, r"backbone\.0\.body\.layer3\.(\d+)\.")
    names = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50", (True, 23): "resnet101"}
    if (bottleneck, depth) not in names:
        raise KeyError("backbone known to this package")
    return names[bottleneck, depth]


def _count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    numbers = [int(found[1]) for key in state_dict if (found := re.match(pattern, key))]
    return 1 + max(numbers, default=-1)


def _options(args: Any) -> SimpleNamespace:
    options = SimpleNamespace(**(DEFAULTS | {key: value for key, value in vars(args).items() if value is not None}))
    if not hasattr(options, "num_classes"):
        # One more than the largest label, as the original has it for each data set.
        options.num_classes = {"coco": 91, "coco_panoptic": PANOPTIC_CLASSES}.get(options.dataset_file, 20)
    return options
