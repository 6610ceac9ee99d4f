"""The public op, its checks, and its registration with torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.ops import _triton
from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.matching_cost.native import matching_cost_native, why_not
from detr_fast.ops.matching_cost.reference import matching_cost_reference
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets, check_matching_inputs


def _run_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from detr_fast.ops.matching_cost.triton_impl import matching_cost_triton  # on demand: it imports Triton

    return matching_cost_triton(*arguments)


OP = Op(
    name="matching_cost",
    implementations=(
        Implementation("native", matching_cost_native, why_not),
        Implementation("triton", _run_triton, lambda logits: _triton.why_not(logits.device)),
        Implementation("reference", matching_cost_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, device=device),),
)


class MatchingCost(NamedTuple):
    """The result of ``matching_cost``.

    Attributes:
        cost: [L, N, Q], float32 (float64 for float64 logits).
        num_nonfinite: [L, B] int64, how many of an image's costs were not numbers (or not below 1e30 in magnitude).
    """

    cost: Tensor
    num_nonfinite: Tensor


def matching_cost(
    logits: Sequence[Tensor] | Tensor,
    boxes: Sequence[Tensor] | Tensor,
    targets: PackedTargets,
    weights: CostWeights = CostWeights(),
    *,
    extra_cost: Sequence[Tensor] | Tensor | None = None,
    backend: str | None = None,
) -> MatchingCost:
    """The cost of giving a target to a query of its own image, for L decoder layers at once.

    Row n of the result belongs to target n of the batch and has one cost for each query of that target's image: no
    pair across images is computed, and nothing is padded. Carion et al. 2020, section 3.1, equation 2.

    A cost that is not a number (NaN or infinite predictions) is replaced by one that is so high that a matching takes
    such a pair only where it can take no other; ``num_nonfinite`` says how many there were. On CUDA, where a label is
    not looked at before, one out of range makes such costs, too.

    Args:
        logits: L tensors [B, Q, classes] of any float dtype (or one [L, B, Q, classes]), "no object" among the
            classes where the weights are not ``focal``.
        boxes: L tensors [B, Q, 4], cxcywh in [0, 1].
        targets: labels [N] in [0, classes), boxes [N, 4] cxcywh in [0, 1], B counts.
        weights: see CostWeights.
        extra_cost: L tensors [N, Q] to add: the place for a term on masks.
        backend: "reference", "native" or "triton"; None takes the fastest that can run here.

    Returns:
        See MatchingCost. Computed in float32 at least.

    Raises:
        ValueError: a shape or dtype is not as above.
        IndexError: a label is out of range, and the tensors are on the CPU.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. On CUDA "triton" does not wait for the device, and can be captured in a CUDA graph after a call
    outside of it; the graph holds the counts. The reference does not take labels out of range there.
    """
    logits, boxes = list(logits), list(boxes)
    extra = None if extra_cost is None else list(extra_cost)
    check_matching_inputs(logits, boxes, targets, extra)
    if goes_through_dispatcher(logits[0]):
        return MatchingCost(
            *torch.ops.detr_fast.matching_cost(*as_schema(logits, boxes, targets, weights, extra), backend)
        )
    return MatchingCost(*OP.choose(backend, logits[0]).run(logits, boxes, targets, weights, extra))


SCHEMA = (
    "(Tensor[] logits, Tensor[] boxes, Tensor labels, Tensor target_boxes, SymInt[] num_targets, float[] weights, "
    "bool focal, Tensor[] extra_cost, str? backend=None) -> (Tensor, Tensor)"
)


def as_schema(
    logits: list[Tensor],
    boxes: list[Tensor],
    targets: PackedTargets,
    weights: CostWeights,
    extra_cost: list[Tensor] | None,
) -> tuple[object, ...]:
    """The arguments in the order and the types of SCHEMA."""
    numbers = [weights.cost_class, weights.cost_bbox, weights.cost_giou, weights.alpha, weights.gamma]
    return logits, boxes, targets.labels, targets.boxes, targets.num_targets, numbers, weights.focal, extra_cost or []


def from_schema(
    logits: list[Tensor],
    boxes: list[Tensor],
    labels: Tensor,
    target_boxes: Tensor,
    num_targets: Sequence[int],
    numbers: Sequence[float],
    focal: bool,
    extra_cost: list[Tensor],
) -> tuple[list[Tensor], list[Tensor], PackedTargets, CostWeights, list[Tensor] | None]:
    """The inverse of ``as_schema``."""
    cost_class, cost_bbox, cost_giou, alpha, gamma = numbers
    weights = CostWeights(cost_class, cost_bbox, cost_giou, focal, alpha, gamma)
    return logits, boxes, PackedTargets(labels, target_boxes, num_targets), weights, extra_cost or None


torch.library.define("detr_fast::matching_cost", SCHEMA)


@torch.library.impl("detr_fast::matching_cost", "CompositeExplicitAutograd")
def _matching_cost(*arguments) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    *inputs, backend = arguments if len(arguments) == 9 else (*arguments, None)
    return OP.choose(backend, inputs[0][0]).run(*from_schema(*inputs))


@torch.library.register_fake("detr_fast::matching_cost")
def _matching_cost_fake(logits, boxes, labels, *rest) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    batch, queries, _ = logits[0].shape
    cost = logits[0].new_empty((len(logits), labels.shape[0], queries), dtype=dtype)
    return cost, logits[0].new_empty((len(logits), batch), dtype=torch.int64)
