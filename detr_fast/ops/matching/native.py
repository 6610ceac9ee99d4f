"""The matching by csrc/cpu/matching.cpp: one pass over an image of a layer, no matrix beyond that image's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.matching_cost.native import NativeArguments
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets


def matching_native(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets,
    weights: CostWeights,
    extra_cost: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    arguments = NativeArguments(logits, boxes, targets, weights, extra_cost)
    layers, batch, _, _ = arguments.sizes
    query_of_target = torch.empty((layers, len(targets.labels)), dtype=torch.int64)
    nonfinite = torch.empty((layers, batch), dtype=torch.int64)
    threads = torch.get_num_threads()
    _native.module().matching_cpu(arguments.inputs, query_of_target.data_ptr(), nonfinite.data_ptr(), threads)
    return query_of_target, nonfinite
