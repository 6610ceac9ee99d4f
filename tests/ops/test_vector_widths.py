"""The native CPU code at every width of vectors: a processor with AVX-512 also runs what others would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detr_fast.ops import SetLosses, assignment
from detr_fast.ops.matching import matching
from detr_fast.ops.matching_cost import matching_cost
from detr_fast.ops.set_criterion import set_criterion
from detr_fast.ops.set_loss import ClassLoss, CrossEntropy, Focal, Varifocal
from ops.assignment_cases import by_scipy, needs_native
from ops.matching_cases import DETR, FOCAL, SHAPES, Case, Shape, double, make_case
from ops.set_loss_cases import check_as_exact_as_the_reference, check_outcome, outcome_of, upstream_for

pytestmark = needs_native


@pytest.mark.parametrize(
    "shape",
    [
        *(s for s in SHAPES.values() if sum(s.num_targets)),
        Shape(1, 33, 15, [5, 2]),
        Shape(1, 15, 16, [5]),
        Shape(1, 18, 33, [5]),
    ],
)
def test_costs(shape: Shape, vector_bytes: int) -> None:
    case = make_case(shape)
    for weights in (DETR, FOCAL, FOCAL._replace(alpha=0.3, gamma=1.5)):
        exact = matching_cost(*double(case), weights, backend="reference").cost
        own_error = (matching_cost(*case, weights, backend="reference").cost - exact).abs().amax()
        error = (matching_cost(*case, weights, backend="native").cost - exact).abs().amax()
        assert error <= 2 * own_error + 1e-6
        found = matching_cost(*double(case), weights, backend="native").cost
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alike", [False, True], ids=["any", "queries alike"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("queries", "targets"), [(100, 30), (61, 61), (9, 40), (300, 77)])
def test_assignments_are_scipys(queries: int, targets: int, dtype: torch.dtype, alike: bool, vector_bytes: int) -> None:
    cost = torch.rand(4, queries, targets, dtype=dtype)
    if alike:
        cost = 1e-3 * cost + torch.rand(4, 1, targets, dtype=dtype)
    ties = torch.randint(4, (4, queries, targets)).to(dtype)
    counts = [targets, targets // 2, 1, targets]
    for costs in (cost, ties):
        assert torch.equal(assignment(costs, counts, backend="native"), by_scipy(costs, counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("queries", "targets"), [(100, 30), (61, 61), (9, 40)])
def test_auctions_are_optimal(queries: int, targets: int, dtype: torch.dtype, vector_bytes: int) -> None:
    cost = torch.randint(1000, (1, queries, targets)).to(dtype)
    total = 0.0
    for found in (assignment(cost, [targets], method="auction", backend="native")[0], by_scipy(cost, [targets])[0]):
        matched = found >= 0
        total = float(cost[0, found[matched], matched.nonzero()[:, 0]].sum()) - total
    assert total == 0


def test_matching_is_the_same_at_every_width(vector_bytes: int) -> None:
    case = make_case(SHAPES["real"])
    found, _ = matching(*case, DETR, backend="native")
    assert torch.equal(found, matching(*case, DETR, backend="reference").query_of_target)


@pytest.mark.parametrize("class_loss", [CrossEntropy(), Focal(), Varifocal(0.7, 1.5)])
def test_losses(class_loss: ClassLoss, vector_bytes: int) -> None:
    for shape in (SHAPES["real"], SHAPES["odd sizes"], Shape(1, 33, 15, [5, 2]), Shape(2, 5, 16, [2, 9])):
        case, upstream = make_case(shape), upstream_for(shape.layers)
        query_of_target = matching(*case, DETR).query_of_target
        check_as_exact_as_the_reference(case, class_loss, "native")

        def losses(logits: list[Tensor], boxes: list[Tensor], case: Case = case) -> SetLosses:
            return set_criterion(logits, boxes, case.targets, DETR, class_loss, num_boxes=3.7).losses

        check_outcome(outcome_of(losses, case, upstream), case, query_of_target, class_loss, 3.7, upstream)
