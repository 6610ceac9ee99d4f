"""What a training run can be told, as frozen dataclasses; each field's ``help`` is also the command line's.

Field names are the original DETR's option names where it has them, so that ``TrainConfig.to_args()`` in a checkpoint is
read like the original's ``args``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PAPER_SCALES = tuple(range(480, 801, 32))


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _required(help: str) -> Any:
    return field(metadata={"help": help})


def _check(condition: bool, name: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The model: a backbone and a transformer (section 3.2 of the paper)."""

    backbone: str = _option("resnet50", "resnet18, resnet34, resnet50, resnet101, or tiny (small, from scratch)")
    dilation: bool = _option(False, "stride 1 in the backbone's last stage (DC5): twice the resolution")
    position_embedding: str = _option("sine", "sine or learned positional encodings")
    hidden_dim: int = _option(256, "width of the transformer")
    nheads: int = _option(8, "attention heads")
    enc_layers: int = _option(6, "encoder layers")
    dec_layers: int = _option(6, "decoder layers")
    dim_feedforward: int = _option(2048, "width of the transformer's feed-forward layers")
    dropout: float = _option(0.1, "dropout in the transformer")
    pre_norm: bool = _option(False, "normalise before each sublayer instead of after it")
    num_queries: int = _option(100, "object queries: the most objects that one image can have")
    aux_loss: bool = _option(True, "a loss after every decoder layer, not only the last")
    masks: bool = _option(False, "a mask head too, for which the annotations need masks")
    activation_checkpointing: bool = _option(False, "train in less memory: the transformer's layers are computed twice")

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "nheads", "dec_layers", "dim_feedforward", "num_queries"):
            _check(getattr(self, name) > 0, name, "positive", getattr(self, name))
        _check(self.enc_layers >= 0, "enc_layers", "0 or more", self.enc_layers)
        _check(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        _check(self.hidden_dim % self.nheads == 0, "hidden_dim", f"a multiple of {self.nheads=}", self.hidden_dim)
        choices = ("sine", "learned")
        _check(self.position_embedding in choices, "position_embedding", f"one of {choices}", self.position_embedding)


@dataclass(frozen=True)
class LossConfig:
    """Weights in the matching cost and in the loss (sections 3.1 and A.2 of the paper)."""

    set_cost_class: float = _option(1.0, "weight of the class in the matching cost")
    set_cost_bbox: float = _option(5.0, "weight of the L1 distance in the matching cost")
    set_cost_giou: float = _option(2.0, "weight of the generalised IoU in the matching cost")
    bbox_loss_coef: float = _option(5.0, "weight of the L1 loss")
    giou_loss_coef: float = _option(2.0, "weight of the generalised IoU loss")
    mask_loss_coef: float = _option(1.0, "weight of the focal loss of masks")
    dice_loss_coef: float = _option(1.0, "weight of the dice loss of masks")
    eos_coef: float = _option(0.1, "weight of the class no-object in the cross-entropy")


@dataclass(frozen=True)
class OptimConfig:
    """The optimisation: AdamW with one drop of the learning rate (section 4 of the paper)."""

    epochs: int = _option(300, "passes over the training set")
    lr: float = _option(1e-4, "learning rate of everything but the backbone")
    lr_backbone: float = _option(1e-5, "learning rate of the backbone; 0 freezes it")
    lr_drop: int = _option(200, "epochs after which both learning rates fall to a tenth")
    weight_decay: float = _option(1e-4, "AdamW's weight decay")
    clip_max_norm: float = _option(0.1, "largest norm of the gradient, 0 for no clipping")
    accumulate: int = _option(1, "batches per update; their losses, each normalised by itself, are averaged")
    amp: bool = _option(False, "forward pass in bfloat16 (autocast); losses and weights stay float32")
    compile: bool = _option(False, "compile the model (torch.compile): needs a C++ compiler, on a GPU Triton")
    cuda_graph: bool = _option(False, "run updates as CUDA graphs, one for each padded size (not tried on a GPU yet)")
    ema_decay: float = _option(0.0, "keep and evaluate a moving average of the weights, such as 0.9997; 0 for none")

    def __post_init__(self) -> None:
        for name in ("epochs", "lr_drop", "accumulate"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("lr", "lr_backbone", "weight_decay", "clip_max_norm"):
            _check(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _check(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        _check(not (self.compile and self.cuda_graph), "cuda_graph", "used without compile", True)
        # A graph is of a whole update, whose gradients nothing outlives.
        _check(not self.cuda_graph or self.accumulate == 1, "accumulate", "1 with cuda_graph", self.accumulate)


@dataclass(frozen=True)
class TrainConfig:
    """One training run on data in COCO format."""

    train_images: Path = _required("folder of training images")
    train_annotations: Path = _required("their COCO annotation file")
    val_images: Path = _required("folder of validation images")
    val_annotations: Path = _required("their COCO annotation file")
    output_dir: Path = _required("folder for checkpoints and log")
    train_segments: Path | None = _option(None, "folder of PNGs: the annotations are of COCO's panoptic format")
    val_segments: Path | None = _option(None, "folder of the validation annotations' PNGs, as train_segments")
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: int = _option(2, "images per batch and process")
    scales: tuple[int, ...] = _option(PAPER_SCALES, "training sizes of an image's shorter side; the largest evaluates")
    max_size: int = _option(1333, "longest side of an image")
    reduced_decoding: bool = _option(True, "train on JPEGs of over twice the needed size decoded at a part of it")
    num_workers: int = _option(2, "processes that load images, per training process")
    device: str = _option("auto", "cuda, cpu, mps, or auto: cuda where there is a GPU")
    seed: int = _option(42, "seed of weights, data order, augmentation and dropout")
    resume: bool = _option(False, "continue the run in the output folder exactly; start it where there is none yet")
    pretrained: Path | None = _option(None, "start from the weights in this checkpoint")
    reset_class_head: bool = _option(False, "with --pretrained: start the class head anew, for other categories")
    frozen_weights: Path | None = _option(None, "with --masks: train the mask head alone, on this detector")
    backbone_weights: str = _option("imagenet", "a ResNet's start: imagenet (a download), none, or a file")
    save_every: int = _option(0, "also keep checkpoint<epoch>.pth every so many epochs, 0 for never")
    log_every: int = _option(10, "updates between two readings of the loss")

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_size", "log_every"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("num_workers", "save_every"):
            _check(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _check(bool(self.scales) and min(self.scales) >= 1, "scales", "one or more positive sizes", self.scales)
        _check(not self.reset_class_head or bool(self.pretrained), "reset_class_head", "used with pretrained", True)

        graph, again = self.optim.cuda_graph, self.model.activation_checkpointing
        _check(not (graph and again), "activation_checkpointing", "off with cuda_graph", again)
        _check(not (graph and self.model.masks), "masks", "off with cuda_graph", True)
        masks, panoptic = self.model.masks, self.train_segments is not None
        _check(masks or self.frozen_weights is None, "frozen_weights", "used with masks", self.frozen_weights)
        _check(masks or not panoptic, "train_segments", "used with masks", self.train_segments)
        _check(panoptic == (self.val_segments is not None), "val_segments", "as train_segments", self.val_segments)

    def to_args(self) -> dict[str, Any]:
        """Every option by its flat name, in plain types, with the original's other names that its readers ask for."""
        groups = {name: getattr(self, name) for name in ("model", "loss", "optim")}
        flat = {name: value for name, value in vars(self).items() if name not in groups}
        for group in groups.values():
            flat.update(asdict(group))
        flat.update({name: str(value) for name, value in flat.items() if isinstance(value, Path)})
        flat.update(scales=list(self.scales), dataset_file="coco_panoptic" if self.train_segments else "coco")
        return flat
