"""set_loss: every backend against the reference, the reference against transformers and finite differences."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.matching_cost import PackedTargets
from detr_fast.ops.set_loss import ClassLoss, CrossEntropy, Focal, SetLosses, Varifocal, set_loss
from detr_fast.ops.set_loss.api import as_schema
from ops.matching_cases import SHAPES, Case, Shape, make_case
from ops.set_loss_cases import (
    CLASS_LOSSES,
    CORNERS,
    LOSS_SHAPES,
    check_as_exact_as_the_reference,
    corner_case,
    gradients_by_pair,
    match,
    outcome,
    upstream_for,
)

needs_native = pytest.mark.skipif(_native.load().module is None, reason=str(_native.load().why_not))
FAST = [pytest.param("native", marks=needs_native)]
BACKENDS = ["reference", *FAST]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("class_loss", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", LOSS_SHAPES.values(), ids=LOSS_SHAPES)
def test_is_as_exact_as_the_reference(shape: Shape, dtype: torch.dtype, class_loss: ClassLoss, backend: str) -> None:
    check_as_exact_as_the_reference(make_case(shape, dtype), class_loss, backend)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
def test_the_references_gradient_is_that_of_finite_differences(class_loss: ClassLoss) -> None:
    case = make_case(Shape(2, 4, 5, [3, 0, 5]), torch.float64)
    query_of_target = match(case)

    def losses(*predictions: Tensor) -> tuple[Tensor, ...]:
        found = set_loss(
            predictions[:2],
            predictions[2:],
            case.targets,
            query_of_target,
            class_loss,
            num_boxes=3,
            backend="reference",
        )
        # The varifocal loss's gradient leaves out how its weights change.
        return found[1:3] if isinstance(class_loss, Varifocal) else found[:3]

    assert torch.autograd.gradcheck(losses, [x.clone().requires_grad_() for x in (*case.logits, *case.boxes)])


class TestAgainstTransformers:
    """Its losses take (queries, targets) pairs, and one layer at a time."""

    @pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0]])
    def test_detr(self, counts: list[int]) -> None:
        theirs = pytest.importorskip("transformers.loss.loss_for_object_detection")
        case = make_case(Shape(1, 10, 7, counts), torch.float64)
        criterion = theirs.ImageLoss(None, 6, 0.1, ["labels", "boxes", "cardinality"]).double()
        self.compare(case, CrossEntropy(0.1), criterion, ["labels", "boxes", "cardinality"])

    def test_focal_of_deformable_detr(self) -> None:
        theirs = pytest.importorskip("transformers.loss.loss_deformable_detr")
        case = make_case(Shape(1, 10, 6, [3, 0, 5]), torch.float64)
        criterion = theirs.DeformableDetrImageLoss(None, 6, 0.3, ["labels", "boxes"])
        self.compare(case, Focal(0.3), criterion, ["labels", "boxes"])

    def test_varifocal_of_rt_detr(self) -> None:
        theirs = pytest.importorskip("transformers.loss.loss_rt_detr")
        config = pytest.importorskip("transformers").RTDetrConfig(
            num_labels=6, focal_loss_alpha=0.7, focal_loss_gamma=1.5
        )
        case = make_case(Shape(1, 10, 6, [3, 0, 5]), torch.float64)
        self.compare(case, Varifocal(0.7, 1.5), theirs.RTDetrLoss(config), ["vfl", "boxes"])

    def compare(self, case: Case, class_loss: ClassLoss, criterion: torch.nn.Module, losses: list[str]) -> None:
        query_of_target = match(case)
        counts = list(case.targets.num_targets)
        rows = query_of_target[0].split(counts)
        indices = [(row, torch.arange(len(row))) for row in rows]
        targets = [
            {"class_labels": labels, "boxes": boxes}
            for labels, boxes in zip(
                case.targets.labels.split(counts), case.targets.boxes.double().split(counts), strict=True
            )
        ]
        logits, boxes = case.logits[0].clone().requires_grad_(), case.boxes[0].clone().requires_grad_()
        outputs = {"logits": logits, "pred_boxes": boxes}
        theirs = {k: v for name in losses for k, v in criterion.get_loss(name, outputs, targets, indices, 3.0).items()}
        ours = set_loss([logits], [boxes], case.targets, query_of_target, class_loss, num_boxes=3.0)
        values = [next(v for k, v in theirs.items() if k in ("loss_ce", "loss_vfl"))]
        values += [theirs["loss_bbox"], theirs["loss_giou"]]
        torch.testing.assert_close(torch.cat(ours[:3]), torch.stack(values), rtol=1e-6, atol=1e-9)
        if "cardinality" in losses:
            assert ours.cardinality_error.item() == pytest.approx(theirs["cardinality_error"].item())
        gradients = [torch.autograd.grad(sum(x), (logits, boxes), retain_graph=True) for x in (values, ours[:3])]
        for theirs_of, ours_of in zip(*gradients, strict=True):
            torch.testing.assert_close(ours_of, theirs_of, rtol=1e-6, atol=1e-9)
        assert gradients[0][0].abs().max() > 1e-3


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_corners_are_pytorchs(dtype: torch.dtype, backend: str) -> None:
    found = gradients_by_pair(CrossEntropy(), backend, dtype)
    expected = gradients_by_pair(CrossEntropy(), "reference", dtype)
    eps = torch.finfo(dtype).eps
    for pair, name in enumerate(CORNERS):
        ours, theirs = found[:, pair], expected[:, pair]
        bound = 16 * eps * theirs.abs().clamp(min=1)
        assert ((ours - theirs).abs() <= bound).all() or torch.equal(ours.isnan(), theirs.isnan()), (name, ours, theirs)
    assert expected.abs().amax((0, 2)).min() >= 0 and expected[1].abs().max() > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_for_logging(backend: str) -> None:
    logits = torch.zeros(2, 4, 3)
    logits[0, 0, 1] = logits[0, 1, 0] = logits[0, 2, 2] = 1.0  # predicts 1, 0, nothing, and (all equal) the first
    logits[1, :, 2] = 1.0  # predicts nothing
    boxes = torch.rand(2, 4, 4)
    targets = PackedTargets(torch.tensor([1, 1, 0, 0]), torch.rand(4, 4), [3, 1])
    query_of_target = torch.tensor([[0, 1, 3, 2]])
    found = set_loss([logits], [boxes], targets, query_of_target, num_boxes=1, backend=backend)
    assert found.class_error.item() == 50
    assert found.cardinality_error.item() == 0.5
    found = set_loss([logits - 0.5], [boxes], targets, query_of_target, Focal(), num_boxes=1, backend=backend)
    assert found.class_error.item() == 50
    assert found.cardinality_error.item() == pytest.approx((0 + 3) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_class_weights(backend: str) -> None:
    case = make_case(Shape(2, 9, 20, [4, 2]), torch.float64)
    query_of_target = match(case)
    weight = 0.1 + torch.rand(20, dtype=torch.float64)
    found = set_loss(*case, query_of_target, CrossEntropy(weight=weight), num_boxes=1, backend=backend).loss_ce
    for layer, logits in enumerate(case.logits):
        label = torch.full((2, 9), 19)
        image = torch.tensor([0, 0, 0, 0, 1, 1])
        label[image, query_of_target[layer]] = case.targets.labels
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), label.flatten(), weight)
        torch.testing.assert_close(found[layer], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_without_a_query_count_nowhere(backend: str) -> None:
    case = make_case(Shape(1, 5, 4, [3]), torch.float64)
    fewer = PackedTargets(case.targets.labels[:2], case.targets.boxes[:2], [2])
    found = set_loss(*case, torch.tensor([[4, 1, -1]]), num_boxes=2, backend=backend)
    expected = set_loss(case.logits, case.boxes, fewer, torch.tensor([[4, 1]]), num_boxes=2, backend=backend)
    for name in ("loss_ce", "loss_bbox", "loss_giou", "class_error"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_some_losses_and_some_inputs(backend: str) -> None:
    case = make_case(SHAPES["odd sizes"])
    query_of_target = match(case)
    logits, boxes = [x.clone().requires_grad_() for x in case.logits], [x.clone() for x in case.boxes]
    boxes[1].requires_grad_()
    found = set_loss(logits, boxes, case.targets, query_of_target, num_boxes=3, backend=backend)
    assert not found.class_error.requires_grad and not found.cardinality_error.requires_grad
    found.loss_giou[1].backward(retain_graph=True)
    assert boxes[1].grad is not None and boxes[1].grad.abs().sum() > 0
    assert all(x.grad is None or not x.grad.any() for x in logits)
    found.loss_ce[2].backward()
    assert logits[2].grad.abs().sum() > 0
    assert not any(x.grad is not None and x.grad.any() for x in logits[:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_may_run_again_and_leaves_the_first_gradient_alone(backend: str) -> None:
    case = make_case(SHAPES["odd sizes"])
    logits = [x.clone().requires_grad_() for x in case.logits]
    found = set_loss(logits, case.boxes, case.targets, match(case), num_boxes=3, backend=backend)
    found.loss_ce.sum().backward(retain_graph=True)
    first = [x.grad.clone() for x in logits]
    for x in logits:
        x.grad.mul_(100)  # as clipping does, in place
    found.loss_ce.sum().backward(retain_graph=True)
    found.loss_ce.sum().backward()
    for x, once in zip(logits, first, strict=True):
        torch.testing.assert_close(x.grad, 102 * once, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_losses_are_the_same(backend: str) -> None:
    case = make_case(SHAPES["real"])
    query_of_target = match(case)
    with torch.no_grad():
        expected = set_loss(*case, query_of_target, num_boxes=31, backend=backend)
    logits = [x.clone().requires_grad_() for x in case.logits]
    found = set_loss(logits, case.boxes, case.targets, query_of_target, num_boxes=31, backend=backend)
    assert not expected.loss_ce.requires_grad and found.loss_ce.requires_grad
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture()
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("class_loss", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
def test_the_number_of_threads_changes_no_bit(class_loss: ClassLoss, threads: None) -> None:
    case = make_case(SHAPES["real"])
    query_of_target, upstream = match(case), upstream_for(6)
    found = []
    for count in (1, 4):
        torch.set_num_threads(count)
        found.append(outcome(case, query_of_target, class_loss, 3.0, upstream, "native"))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend: str) -> None:
    case = make_case(Shape(2, 5, 40, [3, 2]))
    case.logits[0].mul_(1e4)
    case.logits[1].fill_(-math.inf)[..., 5] = 0.0
    case.targets.labels.fill_(5)
    query_of_target = match(case)
    logits = [x.clone().requires_grad_() for x in case.logits]
    found = set_loss(logits, case.boxes, case.targets, query_of_target, num_boxes=5, backend=backend)
    found.loss_ce[0].backward()
    exact = [x.double() for x in case.logits]
    expected = set_loss(exact, case.boxes, case.targets, query_of_target, num_boxes=5, backend="reference")
    torch.testing.assert_close(found.loss_ce[0].double(), expected.loss_ce[0], rtol=1e-6, atol=0)
    assert found.loss_ce[1].isinf()  # the seven queries without an object rule "no object" out
    assert logits[0].grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_logit_that_is_no_number_makes_the_loss_of_its_layer_none(backend: str) -> None:
    case = make_case(Shape(3, 30, 40, [3, 2]))
    query_of_target = match(case)
    case.logits[1][1, 7, 33] = math.nan
    for class_loss in (CrossEntropy(), Focal()):
        found = set_loss(*case, query_of_target, class_loss, num_boxes=5, backend=backend)
        assert found.loss_ce.isnan().tolist() == [False, True, False]


def test_arithmetic_is_float32_under_autocast() -> None:
    case = make_case(SHAPES["odd sizes"])
    query_of_target = match(case)
    expected = set_loss(*case, query_of_target, num_boxes=3)
    for backend in (None, "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            found = set_loss(*case, query_of_target, num_boxes=3, backend=backend)
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("class_loss", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
def test_is_one_node_for_torch(class_loss: ClassLoss) -> None:
    case = make_case(Shape(2, 5, 6, [2, 0, 3]))
    logits = [x.detach().clone().requires_grad_() for x in case.logits]
    boxes = [x.detach().clone().requires_grad_() for x in case.boxes]
    arguments = (*as_schema(logits, boxes, case.targets, match(case), class_loss, torch.tensor(3.0)), True, "native")
    torch.library.opcheck(torch.ops.detr_fast.set_loss.default, arguments)


@needs_native
def test_is_compiled_without_a_break() -> None:
    case = make_case(Shape(2, 5, 6, [2, 0, 3]))
    query_of_target = match(case)

    def total(logits: list[Tensor], boxes: list[Tensor]) -> Tensor:
        found = set_loss(logits, boxes, case.targets, query_of_target, num_boxes=3)
        return (found.loss_ce + found.loss_bbox + found.loss_giou).sum()

    def gradients(run: object) -> tuple[Tensor, ...]:
        predictions = [[x.detach().clone().requires_grad_() for x in layers] for layers in case[:2]]
        return torch.autograd.grad(run(*predictions), [x for layers in predictions for x in layers])

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled), gradients(total), strict=True):
        assert torch.equal(a, b)


class TestRefuses:
    def call(self, **changed: object) -> SetLosses:
        logits, boxes, targets = make_case(Shape(2, 4, 5, [2, 1]))
        arguments = {"logits": logits, "boxes": boxes, "targets": targets}
        arguments |= {"query_of_target": torch.tensor([[0, 1, 2], [3, 2, 1]]), "num_boxes": 3.0}
        return set_loss(**(arguments | changed))

    @pytest.mark.parametrize(
        "bad", [torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)]
    )
    def test_another_matching(self, bad: Tensor) -> None:
        with pytest.raises(ValueError, match=r"query_of_target must be int64 \[2, 3\], got"):
            self.call(query_of_target=bad)

    def test_several_normalisers(self) -> None:
        with pytest.raises(ValueError, match=r"num_boxes must be one number, got \[2\]"):
            self.call(num_boxes=torch.ones(2))

    def test_weights_of_another_number_of_classes(self) -> None:
        with pytest.raises(ValueError, match=r"weight must be \[5\], got \[4\]"):
            self.call(class_loss=CrossEntropy(weight=torch.ones(4)))

    @pytest.mark.parametrize("name", ["query_of_target", "num_boxes", "weight"])
    def test_tensors_of_several_devices(self, name: str) -> None:
        elsewhere = {
            "query_of_target": {"query_of_target": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
            "num_boxes": {"num_boxes": torch.ones((), device="meta")},
            "weight": {"class_loss": CrossEntropy(weight=torch.ones(5, device="meta"))},
        }
        with pytest.raises(ValueError, match=f"{name} must be on cpu, where the logits are, got meta"):
            self.call(**elsewhere[name])

    def test_boxes_of_another_shape(self) -> None:
        with pytest.raises(ValueError, match=r"boxes of layer 0 must be float \[2, 4, 4\]"):
            self.call(boxes=[torch.rand(2, 4, 5)] * 2)

    @needs_native
    def test_a_label_out_of_range(self) -> None:
        targets = PackedTargets(torch.tensor([0, 5, 1]), torch.rand(3, 4), [2, 1])
        with pytest.raises(IndexError, match=r"labels must be in \[0, 4\].*got 5"):
            self.call(targets=targets)

    def test_another_backend(self) -> None:
        with pytest.raises(ValueError, match="backend of set_loss must be None or one of .* got 'cuda'"):
            self.call(backend="cuda")


def test_the_corners_are_corners() -> None:
    case, _ = corner_case(torch.float64)
    from detr_fast.ops.boxes import cxcywh_to_xyxy

    a, b = cxcywh_to_xyxy(case.boxes[0][0]), cxcywh_to_xyxy(case.targets.boxes)
    assert (a == b).any(1).sum() >= 5 and (a[:, 2] == b[:, 0]).any()
