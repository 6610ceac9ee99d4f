"""Matching and losses by csrc/cpu/set_criterion.cpp, which reads the logits once for both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.matching_cost.native import NativeArguments
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets, check_matching_inputs
from detr_fast.ops.set_loss.native import LossResults
from detr_fast.ops.set_loss.types import ClassLoss, CrossEntropy


def set_criterion_native(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets,
    weights: CostWeights,
    extra_cost: Sequence[Tensor] | None,
    class_loss: ClassLoss,
    num_boxes: Tensor,
    with_slopes: bool,
) -> tuple[Tensor, ...]:
    """Losses, metrics, slopes of logits, L1 and GIoU, ``query_of_target`` and ``num_nonfinite``."""
    quick = _native.load().quick
    if quick is not None and extra_cost is None and isinstance(class_loss, CrossEntropy):
        weight = class_loss.weight
        if weight is None:
            weight = class_loss.weights(logits[0].shape[2], logits[0])
        found = quick.criterion(logits, boxes, targets, weights, weight, num_boxes, with_slopes)
        if found is not None:
            return found  # type: ignore[no-any-return]
    check_matching_inputs(logits, boxes, targets, extra_cost)  # as the quick call does
    arguments = NativeArguments(logits, boxes, targets, weights, extra_cost)
    results = LossResults(arguments, class_loss, num_boxes, with_slopes)
    layers, batch, _, _ = arguments.sizes
    query_of_target = torch.empty((layers, len(targets.labels)), dtype=torch.int64)
    num_nonfinite = torch.empty((layers, batch), dtype=torch.int64)
    _native.module().set_criterion_cpu(
        arguments.inputs,
        results.num_boxes.data_ptr(),
        results.class_loss,
        query_of_target.data_ptr(),
        num_nonfinite.data_ptr(),
        results.addresses,
        torch.get_num_threads(),
    )
    return *results.tensors, query_of_target, num_nonfinite
