"""Losses and gradients of every backend side by side, for the tests of set_loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.ops import matching
from detr_fast.ops.set_loss import ClassLoss, CrossEntropy, Focal, SetLosses, Varifocal, set_loss
from ops.matching_cases import DETR, SHAPES, Case, Shape, double, make_case

CLASS_LOSSES = {
    "cross-entropy": CrossEntropy(),
    "focal": Focal(),
    "focal of odd numbers": Focal(0.3, 1.5),
    "focal without modulation": Focal(0.5, 0.0),
    "varifocal": Varifocal(),
}
LOSS_SHAPES = SHAPES | {"one query an object": Shape(1, 3, 20, [3, 3]), "sixteen classes": Shape(2, 5, 16, [2, 4])}


class Outcome(NamedTuple):
    """Of a call and its backward, in float64."""

    losses: Tensor  # [5, L]
    logit_gradient: Tensor  # [L, B, Q, classes]
    box_gradient: Tensor  # [L, B, Q, 4]


def match(case: Case) -> Tensor:
    return matching(*case, DETR).query_of_target


def upstream_for(layers: int) -> Tensor:
    """[3, L] gradients of the losses, all different."""
    return (1 + torch.rand(3, layers, dtype=torch.float64)) * torch.tensor([1, 5, 2])[:, None]


def outcome(
    case: Case, query_of_target: Tensor, class_loss: ClassLoss, num_boxes: float, upstream: Tensor, backend: str | None
) -> Outcome:
    def losses(logits: list[Tensor], boxes: list[Tensor]) -> SetLosses:
        return set_loss(logits, boxes, case.targets, query_of_target, class_loss, num_boxes=num_boxes, backend=backend)

    return outcome_of(losses, case, upstream)


def outcome_of(losses: Callable[[list[Tensor], list[Tensor]], SetLosses], case: Case, upstream: Tensor) -> Outcome:
    logits = [x.detach().requires_grad_() for x in case.logits]
    boxes = [x.detach().requires_grad_() for x in case.boxes]
    found = losses(logits, boxes)
    assert all(x.dtype == torch.promote_types(logits[0].dtype, torch.float32) for x in found)
    (torch.stack(found[:3]) * upstream.to(found[0])).sum().backward()
    assert all(x.grad is not None and x.grad.dtype == x.dtype for x in (*logits, *boxes))
    gradients = [torch.stack([x.grad for x in layers]).double().cpu() for layers in (logits, boxes)]
    return Outcome(torch.stack(found).detach().double().cpu(), *gradients)


def check_as_exact_as_the_reference(
    case: Case, class_loss: ClassLoss, backend: str, on_device: torch.device | str = "cpu"
) -> None:
    """The error against the reference in float64 is at most twice the reference's own, plus a few ulp."""
    query_of_target, num_boxes, upstream = match(case), 3.7, upstream_for(len(case.logits))
    found = outcome(
        moved(case, on_device), query_of_target.to(on_device), class_loss, num_boxes, upstream.to(on_device), backend
    )
    check_outcome(found, case, query_of_target, class_loss, num_boxes, upstream)


def check_outcome(
    found: Outcome,
    case: Case,
    query_of_target: Tensor,
    class_loss: ClassLoss,
    num_boxes: float,
    upstream: Tensor,
) -> None:
    """As ``check_as_exact_as_the_reference``, of what was found for this matching."""
    exact = outcome(double(case), query_of_target, class_loss, num_boxes, upstream, "reference")
    reference = outcome(case, query_of_target, class_loss, num_boxes, upstream, "reference")
    dtype = torch.promote_types(case.logits[0].dtype, torch.float32)
    # In float64 the oracle is no more exact than what it is held against, and its 1 - p loses p's last bits.
    eps = (64 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps
    check_rows(found.losses, reference.losses, exact.losses, eps, loss_terms(case, class_loss))
    eps_of_gradient = max(eps, torch.finfo(case.logits[0].dtype).eps)  # gradients are rounded to the predictions' dtype
    terms = {"logit_gradient": class_term(case, query_of_target, class_loss, num_boxes, upstream), "box_gradient": 0.0}
    for name, term in terms.items():
        rows = [getattr(x, name).flatten()[None] for x in (found, reference, exact)]
        check_rows(*rows, eps_of_gradient, term)


def loss_terms(case: Case, class_loss: ClassLoss) -> Tensor:
    """[5] the largest number that a difference is taken of in each row of ``Outcome.losses``.

    A cross-entropy is the logarithm of a sum of exponentials less a logit, and is rounded as these are, where every
    query is nearly sure of its class too. An exponential of 1 is in each sum.
    """
    largest = max(float(x.abs().max()) if x.numel() else 0.0 for x in case.logits)
    of_classes = max(1.0, largest) if isinstance(class_loss, CrossEntropy) else 0.0
    return torch.tensor([of_classes, 0, 0, 0, 0], dtype=torch.float64)


def class_term(case: Case, query_of_target: Tensor, class_loss: ClassLoss, num_boxes: float, upstream: Tensor) -> float:
    """The largest factor of a p - 1 in the gradient of logits, which is rounded as a number near 1 is.

    Where every query is nearly sure of its class, that is much more than the gradient.
    """
    if not isinstance(class_loss, CrossEntropy):
        return float(upstream[0].max()) / num_boxes
    weights = class_loss.weights(case.logits[0].shape[2], torch.empty(0, dtype=torch.float64))
    num_queries = case.logits[0].shape[0] * case.logits[0].shape[1]
    factors = []
    for of_layer, queries in zip(upstream[0], query_of_target, strict=True):
        matched = weights[case.targets.labels[queries >= 0]]
        of_queries = torch.cat([matched, weights[-1:].expand(num_queries - len(matched))])
        factors.append(float(of_layer * of_queries.max() / of_queries.sum()))
    return max(factors)


def check_rows(found: Tensor, reference: Tensor, exact: Tensor, eps: float, term: float | Tensor = 0.0) -> None:
    """Each row by its own largest number, or by that of the terms that were added up."""
    if exact.numel() == 0:
        return
    size = exact.abs().amax(1).clamp(min=torch.as_tensor(term).to(exact))
    error, bound = (found - exact).abs().amax(1), 2 * (reference - exact).abs().amax(1) + eps * size
    assert (error <= bound).all(), f"{error=}, {bound=}"


def moved(case: Case, device: torch.device | str) -> Case:
    targets = type(case.targets)(*(x.to(device) if isinstance(x, Tensor) else x for x in case.targets))
    return Case([x.to(device) for x in case.logits], [x.to(device) for x in case.boxes], targets)


# Pairs of boxes whose sides meet, or that have none: where min, max, clamp and abs have their corners.
CORNERS = {
    "the same box": ((0.5, 0.5, 0.25, 0.5), (0.5, 0.5, 0.25, 0.5)),
    "one left side": ((0.375, 0.5, 0.25, 0.5), (0.5, 0.5, 0.5, 0.25)),
    "touching sides": ((0.25, 0.5, 0.5, 0.5), (0.75, 0.5, 0.5, 0.5)),
    "touching corners": ((0.25, 0.25, 0.5, 0.5), (0.75, 0.75, 0.5, 0.5)),
    "apart": ((0.25, 0.25, 0.25, 0.25), (0.75, 0.75, 0.25, 0.25)),
    "inside": ((0.5, 0.5, 0.25, 0.25), (0.5, 0.5, 0.5, 0.5)),
    "no width": ((0.5, 0.5, 0.0, 0.5), (0.5, 0.5, 0.25, 0.5)),
    "a point in its target": ((0.5, 0.5, 0.0, 0.0), (0.5, 0.5, 0.25, 0.25)),
    "the same line": ((0.5, 0.5, 0.0, 0.5), (0.5, 0.5, 0.0, 0.5)),
    "the same point": ((0.5, 0.5, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0)),
    "a negative width": ((0.5, 0.5, -0.25, 0.5), (0.5, 0.5, 0.25, 0.5)),
}


def corner_case(dtype: torch.dtype) -> tuple[Case, Tensor]:
    """One image whose query i is matched with target i, a pair of CORNERS each."""
    case = make_case(Shape(1, len(CORNERS), 5, [len(CORNERS)]), dtype)
    queries, targets = (torch.tensor([pair[i] for pair in CORNERS.values()], dtype=dtype) for i in (0, 1))
    case.boxes[0][0] = queries
    return case._replace(targets=case.targets._replace(boxes=targets)), torch.arange(len(CORNERS))[None]


def gradients_by_pair(class_loss: ClassLoss, backend: str, dtype: torch.dtype, device: str = "cpu") -> SetLosses:
    """Of the corner case's boxes: the gradients [pairs, 4] of loss_bbox and of loss_giou."""
    case, query_of_target = corner_case(dtype)
    case, query_of_target = moved(case, device), query_of_target.to(device)
    boxes = [case.boxes[0].detach().requires_grad_()]
    found = set_loss(case.logits, boxes, case.targets, query_of_target, class_loss, num_boxes=1.0, backend=backend)
    both = [torch.autograd.grad(x.sum(), boxes, retain_graph=True)[0][0] for x in (found.loss_bbox, found.loss_giou)]
    return torch.stack(both).double().cpu()
