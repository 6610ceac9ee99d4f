"""The matching by csrc/cpu/matching.cpp and csrc/cuda/matching.cu: no matrix beyond that of one image of one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.matching_cost.native import NativeArguments
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets, PaddedTargets


def why_not(logits: Tensor) -> str | None:
    return _native.why_not(logits.device)


def matching_native(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets | PaddedTargets,
    weights: CostWeights,
    extra_cost: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    on_cuda = logits[0].is_cuda
    quick = _native.load().quick
    if quick is not None and extra_cost is None and not on_cuda:
        found = quick.matching(logits, boxes, targets, weights)
        if found is not None:
            return found  # type: ignore[no-any-return]
    arguments = NativeArguments(logits, boxes, targets, weights, extra_cost, for_kernel=on_cuda)
    layers, batch, _, _ = arguments.sizes
    # Of the padding nothing is written.
    padded, size = arguments.offsets is not None, (layers, len(targets.labels))
    query_of_target = targets.labels.new_full(size, -1) if padded else targets.labels.new_empty(size)
    nonfinite = targets.labels.new_empty((layers, batch))
    (_on_cuda if on_cuda else _on_cpu)(arguments, query_of_target, nonfinite)
    return query_of_target, nonfinite


def _on_cpu(arguments: NativeArguments, query_of_target: Tensor, nonfinite: Tensor) -> None:
    threads = torch.get_num_threads()
    _native.module().matching_cpu(arguments.inputs, query_of_target.data_ptr(), nonfinite.data_ptr(), threads)


def _on_cuda(arguments: NativeArguments, query_of_target: Tensor, nonfinite: Tensor) -> None:
    native = _native.module()
    device = query_of_target.device.index
    workspace_bytes = native.matching_cuda_workspace(arguments.inputs, device)
    workspace = query_of_target.new_empty(workspace_bytes, dtype=torch.uint8)
    native.matching_cuda(
        arguments.inputs,
        arguments.dtype_codes(),
        arguments.padded(),
        query_of_target.data_ptr(),
        nonfinite.data_ptr(),
        workspace.data_ptr(),
        device,
        torch.cuda.current_stream(device).cuda_stream,
    )
