"""The public op, its checks, and its registration with torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher, refuse_padded_targets
from detr_fast.ops.matching.native import matching_native, why_not
from detr_fast.ops.matching.reference import matching_reference
from detr_fast.ops.matching_cost.api import SCHEMA, as_schema, from_schema
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets, PaddedTargets, check_matching_inputs

OP = Op(
    name="matching",
    implementations=(
        Implementation("native", matching_native, why_not),
        Implementation("reference", matching_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, device=device),),
)


class Matching(NamedTuple):
    """The result of ``matching``.

    Attributes:
        query_of_target: [L, N] int64, the query of each target within its image; -1 where there is none, which is so
            for the excess of an image with more targets than queries.
        num_nonfinite: [L, B] int64, how many of an image's costs were not numbers (or not below 1e30 in magnitude).
    """

    query_of_target: Tensor
    num_nonfinite: Tensor


def matching(
    logits: Sequence[Tensor] | Tensor,
    boxes: Sequence[Tensor] | Tensor,
    targets: PackedTargets | PaddedTargets,
    weights: CostWeights = CostWeights(),
    *,
    extra_cost: Sequence[Tensor] | Tensor | None = None,
    backend: str | None = None,
) -> Matching:
    """Give every target its own query of its image at the lowest total cost, for L decoder layers at once.

    It is ``matching_cost`` and ``assignment`` in one pass, without a cost matrix in memory. The totals are optimal for
    the costs as computed; a query whose cost is not a number is matched only where no other is left. On CUDA, where a
    label is not looked at before, the costs of one out of range are not numbers, either.

    Args:
        logits: L tensors [B, Q, classes] of any float dtype (or one [L, B, Q, classes]), "no object" among the
            classes where the weights are not ``focal``.
        boxes: L tensors [B, Q, 4], cxcywh in [0, 1].
        targets: labels [N] in [0, classes), boxes [N, 4] cxcywh in [0, 1], B counts; or padded ones.
        weights: see CostWeights.
        extra_cost: L tensors [N, Q] to add: the place for a term on masks.
        backend: "reference" or "native"; None takes the fastest that can run here.

    Returns:
        See Matching; both on the logits' device.

    Raises:
        ValueError: a shape or dtype is not as above.
        IndexError: a label is out of range, and the tensors are on the CPU.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. On CUDA "native" is one launch for up to 16 layers and 768 images, does not wait for the device,
    and can be captured in a CUDA graph, which then holds the counts, unless targets are padded. The reference waits for
    the device, and does not take labels out of range.
    """
    logits, boxes = list(logits), list(boxes)
    extra = None if extra_cost is None else list(extra_cost)
    check_matching_inputs(logits, boxes, targets, extra)
    if isinstance(targets, PaddedTargets):
        return _matching_of_padded(logits, boxes, targets, weights, extra, backend)
    if goes_through_dispatcher(logits[0]):
        return Matching(*torch.ops.detr_fast.matching(*as_schema(logits, boxes, targets, weights, extra), backend))
    return Matching(*OP.choose(backend, logits[0]).run(logits, boxes, targets, weights, extra))


def _matching_of_padded(
    logits: list[Tensor],
    boxes: list[Tensor],
    targets: PaddedTargets,
    weights: CostWeights,
    extra_cost: list[Tensor] | None,
    backend: str | None,
) -> Matching:
    refuse_padded_targets("matching", logits[0])
    chosen = OP.choose(backend, logits[0])
    if chosen.name == "native" and logits[0].is_cuda:
        return Matching(*chosen.run(logits, boxes, targets, weights, extra_cost))
    packed = targets.trimmed()
    extra = None if extra_cost is None else [x[: len(packed.labels)] for x in extra_cost]
    queries, num_nonfinite = chosen.run(logits, boxes, packed, weights, extra)
    return Matching(targets.padded(queries), num_nonfinite)


torch.library.define("detr_fast::matching", SCHEMA)


@torch.library.impl("detr_fast::matching", "CompositeExplicitAutograd")
def _matching(*arguments) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    *inputs, backend = arguments if len(arguments) == 9 else (*arguments, None)
    return OP.choose(backend, inputs[0][0]).run(*from_schema(*inputs))


@torch.library.register_fake("detr_fast::matching")
def _matching_fake(logits, boxes, labels, *rest) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    query_of_target = logits[0].new_empty((len(logits), labels.shape[0]), dtype=torch.int64)
    return query_of_target, logits[0].new_empty((len(logits), logits[0].shape[0]), dtype=torch.int64)
