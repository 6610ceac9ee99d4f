"""The matching: every backend against SciPy on the reference's float64 costs."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.matching import matching
from detr_fast.ops.matching_cost import CostWeights, matching_cost
from ops.matching_cases import DETR, FOCAL, SHAPES, Case, Shape, double, make_case

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(_native.load().module is None, reason=str(_native.load().why_not))),
]


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [DETR, FOCAL], ids=["softmax", "focal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_total_cost_is_the_optimum(shape: Shape, dtype: torch.dtype, weights: CostWeights, backend: str) -> None:
    case = make_case(shape, dtype)
    check_optimal(matching(*case, weights, backend=backend).query_of_target, case, weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_untrained_model_whose_queries_are_nearly_alike(backend: str) -> None:
    case = make_case(Shape(2, 50, 8, [20, 50, 60]))
    for logits, boxes in zip(case.logits, case.boxes, strict=True):
        logits.mul_(1e-3)
        boxes.mul_(1e-3).add_(0.5)
    check_optimal(matching(*case, DETR, backend=backend).query_of_target, case, DETR)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_queries_and_targets_are_matched_in_scipys_order(backend: str) -> None:
    case = make_case(Shape(1, 9, 4, [5]))
    case.logits[0][:] = case.logits[0][:, :1]
    case.boxes[0][:] = case.boxes[0][:, :1]
    case.targets.labels[:] = case.targets.labels[0]
    case.targets.boxes[:] = case.targets.boxes[0]
    cost = matching_cost(*case, DETR, backend=backend).cost[0].T  # [Q, T], all equal
    queries, targets = linear_sum_assignment(cost.numpy())
    found = matching(*case, DETR, backend=backend).query_of_target[0]
    assert found[targets].tolist() == queries.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_a_number_is_matched_last(backend: str) -> None:
    case = make_case(Shape(1, 6, 4, [5]))
    case.logits[0][0, [1, 4]] = math.nan
    found, num_nonfinite = matching(*case, DETR, backend=backend)
    assert num_nonfinite.tolist() == [[10]]
    assert set(found[0].tolist()) > {0, 2, 3, 5} and len(set(found[0].tolist())) == 5
    clean = matching([case.logits[0][:, [0, 2, 3, 5]]], [case.boxes[0][:, [0, 2, 3, 5]]], case.targets, DETR)
    kept = found[0] != found[0][(found[0] == 1) | (found[0] == 4)]
    assert torch.tensor([0, 2, 3, 5])[clean.query_of_target[0][kept]].tolist() == found[0][kept].tolist()


def test_native_matches_as_the_reference_on_many_random_batches() -> None:
    if _native.load().module is None:
        pytest.skip(str(_native.load().why_not))
    for _ in range(100):
        queries = int(torch.randint(1, 40, ()))
        counts = torch.randint(0, 15, (3,)).tolist()
        case = make_case(Shape(2, queries, 11, counts), torch.float64)
        native, reference = (matching(*case, DETR, backend=b).query_of_target for b in ("native", "reference"))
        assert torch.equal(native, reference)


def test_threads_may_call_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    case = make_case(SHAPES["real"])
    expected = matching(*case, DETR).query_of_target
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: matching(*case, DETR).query_of_target, range(40)):
            assert torch.equal(result, expected)
