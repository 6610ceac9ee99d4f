"""set_criterion: its matching against SciPy, its losses against the reference of set_loss for that matching."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from detr_fast.ops import CostWeights, MatchedLosses, PackedTargets, SetLosses, _native, matching, set_loss
from detr_fast.ops.set_criterion import set_criterion
from detr_fast.ops.set_criterion.api import as_schema
from detr_fast.ops.set_loss import ClassLoss, CrossEntropy, Focal
from ops.matching_cases import DETR, FOCAL, SHAPES, Case, Shape, check_optimal, make_case
from ops.set_loss_cases import (
    CLASS_LOSSES,
    CORNERS,
    LOSS_SHAPES,
    Outcome,
    check_outcome,
    corner_case,
    outcome_of,
    upstream_for,
)

needs_native = pytest.mark.skipif(_native.load().module is None, reason=str(_native.load().why_not))
NATIVE = pytest.param("native", marks=needs_native)
BACKENDS = ["reference", "composed", NATIVE]
COST_OF = {"cross-entropy": DETR, "focal": FOCAL, "varifocal": DETR}


def run(
    case: Case, weights: CostWeights, class_loss: ClassLoss, upstream: Tensor, backend: str | None
) -> tuple[Outcome, Tensor, Tensor]:
    """Losses and gradients, queries, counts."""
    found: list[MatchedLosses] = []

    def losses(logits: list[Tensor], boxes: list[Tensor]) -> SetLosses:
        found.append(set_criterion(logits, boxes, case.targets, weights, class_loss, num_boxes=3.7, backend=backend))
        return found[0].losses

    outcome = outcome_of(losses, case, upstream)
    return outcome, *found[0].matching


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("class_loss", COST_OF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", LOSS_SHAPES.values(), ids=LOSS_SHAPES)
def test_matches_as_scipy_and_its_losses_are_the_references(
    shape: Shape, dtype: torch.dtype, class_loss: str, backend: str
) -> None:
    case, upstream, kind = make_case(shape, dtype), upstream_for(shape.layers), CLASS_LOSSES[class_loss]
    outcome, query_of_target, num_nonfinite = run(case, COST_OF[class_loss], kind, upstream, backend)
    check_optimal(query_of_target, case, COST_OF[class_loss])
    assert num_nonfinite.tolist() == [[0] * len(shape.num_targets)] * shape.layers
    check_outcome(outcome, case, query_of_target, kind, 3.7, upstream)


@needs_native
@pytest.mark.parametrize("class_loss", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
@pytest.mark.parametrize("weights", [DETR, FOCAL], ids=["softmax", "focal"])
def test_is_what_the_two_ops_are(weights: CostWeights, class_loss: ClassLoss) -> None:
    for shape in LOSS_SHAPES.values():
        case, upstream = make_case(shape), upstream_for(shape.layers)
        found, expected = (run(case, weights, class_loss, upstream, name) for name in ("native", "composed"))
        assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
        for ours, theirs in zip(found[0], expected[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extra_costs_are_added_and_a_given_normaliser_may_be_a_tensor(backend: str) -> None:
    case = make_case(Shape(2, 9, 6, [4, 0, 3]))
    extra = [10 * torch.rand(7, 9) for _ in case.logits]
    found = set_criterion(*case, DETR, num_boxes=torch.tensor(7.0), extra_cost=extra, backend=backend)
    expected = matching(*case, DETR, extra_cost=extra, backend="reference")
    assert torch.equal(found.matching.query_of_target, expected.query_of_target)
    assert not torch.equal(found.matching.query_of_target, matching(*case, DETR).query_of_target)
    losses = set_loss(*case, expected.query_of_target, num_boxes=7.0, backend="reference")
    torch.testing.assert_close(torch.stack(found.losses), torch.stack(losses), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [6, 4])
def test_costs_that_are_no_numbers_are_matched_last_and_counted(queries: int, backend: str) -> None:
    case = make_case(Shape(2, queries, 4, [3, 5]))
    case.logits[1][0, 1] = math.nan
    found = set_criterion(*case, DETR, num_boxes=8, backend=backend)
    assert found.matching.num_nonfinite.tolist() == [[0, 0], [3, 0]]
    assert 1 not in found.matching.query_of_target[1, :3]
    assert found.losses.loss_ce.isnan().tolist() == [False, True]
    assert found.losses.loss_bbox.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_corners_are_pytorchs(dtype: torch.dtype, backend: str) -> None:
    """Every corner's query takes its own target, because a given cost says so."""
    case, _ = corner_case(dtype)
    extra, upstream = 1000 * (1 - torch.eye(len(CORNERS), dtype=dtype)), torch.tensor([[1.0], [5.0], [2.0]])

    def losses(logits: list[Tensor], boxes: list[Tensor]) -> SetLosses:
        found = set_criterion(logits, boxes, case.targets, DETR, num_boxes=1, extra_cost=[extra], backend=backend)
        assert found.matching.query_of_target.tolist() == [list(range(len(CORNERS)))]
        return found.losses

    def expected_losses(logits: list[Tensor], boxes: list[Tensor]) -> SetLosses:
        queries = torch.arange(len(CORNERS))[None]
        return set_loss(logits, boxes, case.targets, queries, num_boxes=1, backend="reference")

    found, expected = (outcome_of(x, case, upstream).box_gradient[0, 0] for x in (losses, expected_losses))
    for name, ours, theirs in zip(CORNERS, found, expected, strict=True):
        bound = 64 * torch.finfo(dtype).eps * theirs.abs().clamp(min=1)
        assert ((ours - theirs).abs() <= bound).all() or torch.equal(ours.isnan(), theirs.isnan()), (name, ours, theirs)
    assert expected.abs().max() > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_losses_are_the_same(backend: str) -> None:
    for shape in (SHAPES["real"], SHAPES["more targets than queries"], SHAPES["odd sizes"]):
        case = make_case(shape)
        with torch.no_grad():
            expected = set_criterion(*case, DETR, num_boxes=31, backend=backend)
        logits = [x.clone().requires_grad_() for x in case.logits]
        found = set_criterion(logits, case.boxes, case.targets, DETR, num_boxes=31, backend=backend)
        assert not expected.losses.loss_ce.requires_grad and found.losses.loss_ce.requires_grad
        for a, b in zip((*found.losses, *found.matching), (*expected.losses, *expected.matching), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.fixture()
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("class_loss", ["cross-entropy", "varifocal"])
@pytest.mark.parametrize("shape", ["real", "more targets than queries"])
def test_the_number_of_threads_changes_no_bit(shape: str, class_loss: str, threads: None) -> None:
    case, upstream = make_case(SHAPES[shape]), upstream_for(SHAPES[shape].layers)
    found = []
    for count in (1, 4):
        torch.set_num_threads(count)
        outcome, *matched = run(case, DETR, CLASS_LOSSES[class_loss], upstream, "native")
        found.append((*outcome, *matched))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_native
def test_backward_may_run_again_and_leaves_the_first_gradient_alone() -> None:
    case = make_case(Shape(2, 5, 6, [2, 3]))
    logits = [x.clone().requires_grad_() for x in case.logits]
    total = set_criterion(logits, case.boxes, case.targets, DETR, num_boxes=5, backend="native").losses.loss_ce.sum()
    (first,) = torch.autograd.grad(total, logits[:1], retain_graph=True)
    kept = first.clone()
    first.add_(1)
    (second,) = torch.autograd.grad(total, logits[:1])
    assert torch.equal(second, kept)


@needs_native
@pytest.mark.parametrize("class_loss", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
def test_is_one_node_for_torch(class_loss: ClassLoss) -> None:
    case = make_case(Shape(2, 5, 6, [2, 0, 3]))
    logits = [x.detach().clone().requires_grad_() for x in case.logits]
    boxes = [x.detach().clone().requires_grad_() for x in case.boxes]
    extra = [torch.rand(5, 5) for _ in logits] if isinstance(class_loss, Focal) else None
    arguments = as_schema(logits, boxes, case.targets, DETR, extra, class_loss, torch.tensor(3.0))
    torch.library.opcheck(torch.ops.detr_fast.set_criterion.default, (*arguments, True))


@needs_native
def test_is_compiled_without_a_break() -> None:
    case = make_case(Shape(2, 5, 6, [2, 0, 3]))

    def total(logits: list[Tensor], boxes: list[Tensor]) -> Tensor:
        found = set_criterion(logits, boxes, case.targets, DETR, num_boxes=3).losses
        return (found.loss_ce + found.loss_bbox + found.loss_giou).sum()

    def gradients(run: object) -> tuple[Tensor, ...]:
        predictions = [[x.detach().clone().requires_grad_() for x in layers] for layers in case[:2]]
        return torch.autograd.grad(run(*predictions), [x for layers in predictions for x in layers])

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled), gradients(total), strict=True):
        assert torch.equal(a, b)


class TestRefuses:
    def call(self, **changed: object) -> MatchedLosses:
        logits, boxes, targets = make_case(Shape(2, 4, 5, [2, 1]))
        arguments = {"logits": logits, "boxes": boxes, "targets": targets, "num_boxes": 3.0}
        return set_criterion(**(arguments | changed))

    def test_several_normalisers(self) -> None:
        with pytest.raises(ValueError, match=r"num_boxes must be one number, got \[2\]"):
            self.call(num_boxes=torch.ones(2))

    def test_weights_of_another_number_of_classes(self) -> None:
        with pytest.raises(ValueError, match=r"weight must be \[5\], got \[4\]"):
            self.call(class_loss=CrossEntropy(weight=torch.ones(4)))

    def test_a_normaliser_on_another_device(self) -> None:
        with pytest.raises(ValueError, match="num_boxes must be on cpu, where the logits are, got meta"):
            self.call(num_boxes=torch.ones((), device="meta"))

    def test_boxes_of_another_shape(self) -> None:
        with pytest.raises(ValueError, match=r"boxes of layer 0 must be float \[2, 4, 4\]"):
            self.call(boxes=[torch.rand(2, 4, 5)] * 2)

    def test_extra_costs_of_another_number_of_layers(self) -> None:
        with pytest.raises(ValueError, match="extra_cost must be of 2 layers, got 1"):
            self.call(extra_cost=[torch.rand(3, 4)])

    @needs_native
    def test_a_label_out_of_range(self) -> None:
        targets = PackedTargets(torch.tensor([0, 5, 1]), torch.rand(3, 4), [2, 1])
        for class_loss in (CrossEntropy(), Focal()):
            with pytest.raises(IndexError, match=r"labels must be in \[0, 4\].*got 5"):
                self.call(targets=targets, class_loss=class_loss)

    def test_another_backend(self) -> None:
        with pytest.raises(ValueError, match="backend of set_criterion must be None or one of .* got 'triton'"):
            self.call(backend="triton")
