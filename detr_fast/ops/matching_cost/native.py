"""The matching cost by csrc/cpu/matching_cost.cpp, and the packing of its arguments, which ``matching`` shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets, PaddedTargets


def why_not(logits: Tensor) -> str | None:
    if logits.device.type != "cpu":
        return f"there is no native code for {logits.device.type} devices yet"
    return _native.why_not(logits.device)


def matching_cost_native(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: PackedTargets,
    weights: CostWeights,
    extra_cost: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    arguments = NativeArguments(logits, boxes, targets, weights, extra_cost)
    layers, batch, queries, _ = arguments.sizes
    cost = torch.empty((layers, len(targets.labels), queries), dtype=arguments.dtype)
    nonfinite = torch.empty((layers, batch), dtype=torch.int64)
    threads = torch.get_num_threads()
    _native.module().matching_cost_cpu(arguments.inputs, cost.data_ptr(), nonfinite.data_ptr(), threads)
    return cost, nonfinite


class NativeArguments:
    """Predictions and targets as addresses and sizes; holds the tensors that the addresses point into.

    Numbers become ``dtype``, in which costs are computed. For a kernel, which reads each of _native.DTYPES as it lies,
    they stay what they are where they can; and only a kernel takes padded targets.
    """

    def __init__(
        self,
        logits: Sequence[Tensor],
        boxes: Sequence[Tensor],
        targets: PackedTargets | PaddedTargets,
        weights: CostWeights,
        extra_cost: Sequence[Tensor] | None,
        *,
        for_kernel: bool = False,
    ) -> None:
        self.dtype = torch.promote_types(logits[0].dtype, torch.float32)
        self.logits = _same_strides(_readable(logits, self.dtype, for_kernel))
        self.boxes = _same_strides(_readable(boxes, self.dtype, for_kernel))
        self.extra = [x.contiguous() for x in _readable(extra_cost or (), self.dtype, for_kernel)]
        self.labels = targets.labels.contiguous()
        self.target_boxes = _readable([targets.boxes], self.dtype, for_kernel)[0].contiguous()
        self.sizes = (len(logits), *logits[0].shape)
        self.offsets: Tensor | None = None
        if isinstance(targets, PaddedTargets):
            assert for_kernel
            self.offsets = targets.offsets.contiguous()
            num_targets: Sequence[int] = [targets.most] * logits[0].shape[0]  # at most
        else:
            num_targets = targets.num_targets
        self.inputs: Any = _native.module().MatchingInputs(
            self.dtype == torch.float64,
            self.sizes,
            [x.data_ptr() for x in self.logits],
            [x.data_ptr() for x in self.boxes],
            [x.data_ptr() for x in self.extra],
            self.logits[0].stride()[:2],
            self.boxes[0].stride()[:2],
            self.labels.data_ptr(),
            self.target_boxes.data_ptr(),
            list(num_targets),
            (weights.cost_class, weights.cost_bbox, weights.cost_giou, weights.alpha, weights.gamma),
            weights.focal,
        )

    def padded(self) -> tuple[int, int]:
        """Where the offsets lie, 0 where there is no padding, and the room for targets."""
        return (0 if self.offsets is None else self.offsets.data_ptr(), len(self.labels))

    def dtype_codes(self) -> tuple[int, ...]:
        """Of logits, boxes, target boxes and extra costs."""
        kinds = (self.logits, self.boxes, [self.target_boxes], self.extra or self.logits)
        return tuple(_native.DTYPES[kind[0].dtype] for kind in kinds)


def _readable(tensors: Sequence[Tensor], dtype: torch.dtype, for_kernel: bool) -> list[Tensor]:
    dtypes = {x.dtype for x in tensors}
    if dtypes == {dtype} or (for_kernel and len(dtypes) == 1 and dtypes <= _native.DTYPES.keys()):
        return list(tensors)
    return [x.detach().to(dtype) for x in tensors]


def _same_strides(layers: list[Tensor]) -> list[Tensor]:
    """The layers as they lie, where one set of strides describes them all and the last dimension is contiguous."""
    stride = layers[0].stride()
    if stride[-1] == 1 and all(x.stride() == stride for x in layers):
        return layers
    return [x.contiguous() for x in layers]
