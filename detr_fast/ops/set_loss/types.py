"""What ``set_loss`` takes besides predictions and targets, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.ops.matching_cost.types import PackedTargets, PaddedTargets, check_matching_inputs


class CrossEntropy(NamedTuple):
    """DETR's: softmax over C + 1 classes, the last of them "no object"; a mean weighted by each query's class.

    Attributes:
        eos_coef: the weight of "no object", where every other class weighs 1.
        weight: [C + 1] float on the logits' device, the weights of all classes; ``eos_coef`` is then not looked at.
    """

    eos_coef: float = 0.1
    weight: Tensor | None = None

    def weights(self, classes: int, like: Tensor) -> Tensor:
        """[C + 1] in the dtype and on the device of ``like``."""
        if self.weight is not None:
            return self.weight.detach().to(like.dtype).contiguous()
        weight = like.new_ones(classes)
        weight[-1:].fill_(self.eos_coef)
        return weight


class Focal(NamedTuple):
    """The sigmoid focal loss over C classes (Lin et al. 2017, equation 5), summed, divided by ``num_boxes``."""

    alpha: float = 0.25
    gamma: float = 2.0


class Varifocal(NamedTuple):
    """The varifocal loss over C classes (Zhang et al. 2021, equation 2), summed, divided by ``num_boxes``.

    The target of a matched query's class is the IoU of its boxes, through which no gradient flows; other classes weigh
    alpha p^gamma, whose gradient is not followed either.
    """

    alpha: float = 0.75
    gamma: float = 2.0


ClassLoss = CrossEntropy | Focal | Varifocal


class SetLosses(NamedTuple):
    """The result of ``set_loss``: L numbers each, one a decoder layer.

    Attributes:
        loss_ce: the class loss.
        loss_bbox: L1 distance (cxcywh) of matched boxes, summed, divided by ``num_boxes``.
        loss_giou: 1 - generalized IoU of matched boxes, summed, divided by ``num_boxes``.
        class_error: percent of matched queries whose highest logit is not their target's; 100 where nothing is matched.
            No gradient.
        cardinality_error: how far the number of an image's queries that predict an object is from its number of
            targets, averaged over images. A query predicts one when its highest logit is not that of "no object", or,
            where the class loss is a sigmoid's, is above 0. No gradient.
    """

    loss_ce: Tensor
    loss_bbox: Tensor
    loss_giou: Tensor
    class_error: Tensor
    cardinality_error: Tensor


def check_set_loss_inputs(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets | PaddedTargets,
    query_of_target: Tensor,
    class_loss: ClassLoss,
    num_boxes: Tensor | float,
) -> None:
    """Raise ValueError where shapes, dtypes or devices do not fit together; values are not looked at."""
    check_matching_inputs(logits, boxes, targets, None)
    device = logits[0].device
    expected = [len(logits), len(targets.labels)]
    if list(query_of_target.shape) != expected or query_of_target.dtype != torch.int64:
        got = f"{query_of_target.dtype} {list(query_of_target.shape)}"
        raise ValueError(f"query_of_target must be int64 {expected}, got {got}")
    _check_devices(device, query_of_target=query_of_target)
    check_loss_options(logits[0], class_loss, num_boxes)


def check_loss_options(logits: Tensor, class_loss: ClassLoss, num_boxes: Tensor | float) -> None:
    """Raise ValueError where these do not fit the logits [B, Q, classes] of a layer."""
    if isinstance(num_boxes, Tensor):
        if num_boxes.numel() != 1:
            raise ValueError(f"num_boxes must be one number, got {list(num_boxes.shape)}")
        _check_devices(logits.device, num_boxes=num_boxes)
    if isinstance(class_loss, CrossEntropy) and class_loss.weight is not None:
        if list(class_loss.weight.shape) != [logits.shape[2]]:
            raise ValueError(f"weight must be [{logits.shape[2]}], got {list(class_loss.weight.shape)}")
        _check_devices(logits.device, weight=class_loss.weight)


def _check_devices(device: torch.device, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, where the logits are, got {tensor.device}")


def result_sizes(layers: int, batch: int, queries: int, classes: int) -> list[tuple[int, ...]]:
    """Of losses, metrics, and the gradients of each layer's losses: "slopes" of logits, L1 and GIoU."""
    return [(3, layers), (2, layers), (layers, batch, queries, classes), *[(layers, batch, queries, 4)] * 2]
