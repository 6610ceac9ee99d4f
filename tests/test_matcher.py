"""HungarianMatcher: the original's cost written out pair by pair, and its return value."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from small import random_outputs, random_targets
from torch import Tensor

from detr_fast import HungarianMatcher


def pair_cost(logits: Tensor, box: Tensor, label: int, target_box: Tensor) -> float:
    """Class 1, L1 5, GIoU 2, in plain arithmetic."""
    x0, y0, x1, y1 = box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2
    cx, cy, w, h = target_box
    u0, v0, u1, v1 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    intersection = max(min(x1, u1) - max(x0, u0), 0) * max(min(y1, v1) - max(y0, v0), 0)
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - intersection
    around = (max(x1, u1) - min(x0, u0)) * (max(y1, v1) - min(y0, v0))
    giou = intersection / union - (around - union) / around
    probability = logits[label].exp() / logits.exp().sum()
    return float(-probability + 5 * (box - target_box).abs().sum() - 2 * giou)


@pytest.mark.parametrize("counts", [[3], [0, 4], [7, 2], [10, 1], [0, 0]])
def test_matches_at_the_lowest_total_cost(counts: list[int]) -> None:
    outputs, targets = random_outputs(len(counts)), random_targets(counts)
    pairs = HungarianMatcher(1, 5, 2)(outputs, targets)
    assert len(pairs) == len(counts)
    for image, ((queries, found), target) in enumerate(zip(pairs, targets, strict=True)):
        logits, boxes = outputs["pred_logits"][image].double(), outputs["pred_boxes"][image].double()
        cost = torch.zeros(len(boxes), len(target["labels"]), dtype=torch.float64)
        for q, t in itertools.product(range(cost.shape[0]), range(cost.shape[1])):
            cost[q, t] = pair_cost(logits[q], boxes[q], int(target["labels"][t]), target["boxes"][t].double())
        expected_queries, expected_targets = linear_sum_assignment(cost.numpy())
        assert queries.dtype == found.dtype == torch.int64
        assert queries.tolist() == expected_queries.tolist()
        assert found.tolist() == expected_targets.tolist()


def test_a_perfect_prediction_is_found_in_any_order() -> None:
    targets = random_targets([6])
    order = torch.randperm(7)
    boxes = torch.cat((targets[0]["boxes"], torch.tensor([[0.5, 0.5, 0.01, 0.01]])))[order]
    labels = torch.cat((targets[0]["labels"], torch.tensor([5])))[order]
    outputs = {"pred_logits": 20 * torch.nn.functional.one_hot(labels, 6).float()[None], "pred_boxes": boxes[None]}
    queries, found = HungarianMatcher(1, 5, 2)(outputs, targets)[0]
    assert order[queries].tolist() == found.tolist()


def test_half_precision_logits_are_matched_in_float32() -> None:
    outputs, targets = random_outputs(2), random_targets([3, 2])
    halved = {key: value.bfloat16() for key, value in outputs.items()}
    exact = {key: value.float() for key, value in halved.items()}
    matcher = HungarianMatcher(1, 5, 2)
    for a, b in zip(matcher(halved, targets), matcher(exact, targets), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_refuses_weights_that_are_all_zero() -> None:
    with pytest.raises(ValueError, match="must not be 0"):
        HungarianMatcher(0, 0, 0)


def test_layers_matched_at_once_are_matched_as_one_by_one() -> None:
    layers, targets = [random_outputs(3) for _ in range(4)], random_targets([3, 0, 9])
    matcher = HungarianMatcher(1, 5, 2)
    at_once = matcher.match_layers(layers, targets)
    assert at_once.shape == (4, 12)
    for row, outputs in zip(at_once, layers, strict=True):
        for image, (queries, found) in zip(row.split([3, 0, 9]), matcher(outputs, targets), strict=True):
            assert image[found].tolist() == queries.tolist()
            assert (image >= 0).sum() == len(queries)
