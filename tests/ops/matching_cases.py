"""Predictions and targets of awkward shapes, for the tests of matching_cost and matching."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from small import random_boxes
from torch import Tensor

from detr_fast.ops.matching_cost import CostWeights, PackedTargets, PaddedTargets, matching_cost

DETR = CostWeights(1, 5, 2)
FOCAL = CostWeights(2, 5, 2, focal=True)


class Shape(NamedTuple):
    layers: int
    queries: int
    classes: int
    num_targets: list[int]


SHAPES = {
    "one query": Shape(1, 1, 3, [1, 0]),
    "no targets in one image": Shape(2, 10, 92, [3, 0, 5]),
    "no targets at all": Shape(2, 10, 5, [0, 0]),
    "more targets than queries": Shape(2, 4, 7, [9, 2]),
    "as many targets as queries": Shape(1, 6, 7, [6]),
    "one class": Shape(1, 5, 1, [2]),
    "odd sizes": Shape(3, 37, 19, [11, 1, 13]),
    "real": Shape(6, 100, 92, [7, 3, 20, 1]),
}


class Case(NamedTuple):
    logits: list[Tensor]
    boxes: list[Tensor]
    targets: PackedTargets


def make_case(shape: Shape, dtype: torch.dtype = torch.float32) -> Case:
    """Random predictions; logits are a slice of a wider tensor, so that strides are not those of the shape."""
    batch, total = len(shape.num_targets), sum(shape.num_targets)
    wide = 3 * torch.randn(shape.layers, batch, shape.queries + 2, shape.classes + 5)
    logits = wide[:, :, 1:-1, 2:-3].to(dtype)
    boxes = torch.stack([random_boxes(batch * shape.queries) for _ in range(shape.layers)])
    labels = torch.randint(shape.classes, (total,))
    targets = PackedTargets(labels, random_boxes(total), shape.num_targets)
    return Case(list(logits), list(boxes.view(shape.layers, batch, shape.queries, 4).to(dtype)), targets)


def padded(targets: PackedTargets, room: int) -> PaddedTargets:
    """With room for more targets, which holds what nobody may read."""
    labels = torch.cat([targets.labels, torch.full((room,), 2**40)])
    boxes = torch.cat([targets.boxes, targets.boxes.new_full((room, 4), torch.nan)])
    offsets = torch.tensor([0, *targets.num_targets]).cumsum(0)
    return PaddedTargets(labels, boxes, offsets, max(targets.num_targets))


def double(case: Case) -> Case:
    return Case(
        [x.double() for x in case.logits],
        [x.double() for x in case.boxes],
        case.targets._replace(boxes=case.targets.boxes.double()),
    )


def check_optimal(query_of_target: Tensor, case: Case, weights: CostWeights) -> None:
    """One to one, complete, and of SciPy's total on costs in float64."""
    cost = matching_cost(*double(case), weights, backend="reference").cost
    assert query_of_target.shape == cost.shape[:2] and query_of_target.dtype == torch.int64
    first = 0
    for count in case.targets.num_targets:
        for layer in range(len(cost)):
            block = cost[layer, first : first + count]  # [T, Q]
            found = query_of_target[layer, first : first + count]
            matched = found >= 0
            assert matched.sum() == min(block.shape)
            assert len(set(found[matched].tolist())) == min(block.shape)
            total = block[matched, found[matched]].sum().item()
            optimum = block[linear_sum_assignment(block.numpy())].sum().item()
            # Each of the pairs may be rounded by a few float32 steps.
            assert total == pytest.approx(optimum, abs=1e-5 * (1 + min(block.shape)))
        first += count
