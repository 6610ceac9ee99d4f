"""What is asked of the Triton set_loss wherever it can run: on a GPU, or without one under Triton's interpreter.

``test_set_loss_triton.py`` runs this file in a process of its own. Not collected by name.
"""

from __future__ import annotations

import math

import pytest
import torch

from detr_fast.ops.matching_cost import PackedTargets
from detr_fast.ops.set_loss import ClassLoss, CrossEntropy, Focal, set_loss
from detr_fast.ops.set_loss.triton_impl import IMAGES_PER_LAUNCH, LAYERS_PER_LAUNCH
from ops.matching_cases import Case, Shape, make_case, padded
from ops.set_loss_cases import (
    CLASS_LOSSES,
    LOSS_SHAPES,
    check_as_exact_as_the_reference,
    gradients_by_pair,
    match,
    moved,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes a tenth of a second for a program: of the real size, one layer and two images.
SIZES = LOSS_SHAPES | {
    "real": Shape(1, 100, 92, [7, 2]),
    "odd sizes": Shape(2, 19, 37, [11, 1, 0]),
    "more classes than a block": Shape(1, 17, 131, [17]),
    "more images than a launch": Shape(1, 2, 3, [i % 3 for i in range(IMAGES_PER_LAUNCH + 2)]),
    "more layers than a launch": Shape(LAYERS_PER_LAUNCH + 1, 3, 2, [2]),
    "more targets than a block of them": Shape(1, 4, 3, [100, 60]),
}


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_is_as_exact_as_the_reference(shape: Shape) -> None:
    check_as_exact_as_the_reference(make_case(shape), CrossEntropy(), "triton", DEVICE)


@pytest.mark.parametrize("class_loss", list(CLASS_LOSSES.values())[1:], ids=list(CLASS_LOSSES)[1:])
@pytest.mark.parametrize("name", ["odd sizes", "more classes than a block", "more targets than queries"])
def test_sigmoid_losses(name: str, class_loss: ClassLoss) -> None:
    check_as_exact_as_the_reference(make_case(SIZES[name]), class_loss, "triton", DEVICE)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, class_loss: ClassLoss) -> None:
    check_as_exact_as_the_reference(make_case(Shape(2, 4, 7, [9, 0, 2]), dtype), class_loss, "triton", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_corners_are_pytorchs(dtype: torch.dtype) -> None:
    found = gradients_by_pair(CrossEntropy(), "triton", dtype, DEVICE)
    expected = gradients_by_pair(CrossEntropy(), "reference", dtype)
    bound = 16 * torch.finfo(dtype).eps * expected.abs().clamp(min=1)
    assert ((found - expected).abs() <= bound).all() or torch.equal(found.isnan(), expected.isnan())


def test_class_weights_and_targets_without_a_query() -> None:
    case = make_case(Shape(2, 9, 20, [4, 2]), torch.float64)
    query_of_target = match(case)
    query_of_target[0, 1] = -1
    class_loss = CrossEntropy(weight=0.1 + torch.rand(20))
    expected = set_loss(*case, query_of_target, class_loss, num_boxes=2, backend="reference")
    found = set_loss(
        *moved(case, DEVICE),
        query_of_target.to(DEVICE),
        CrossEntropy(weight=class_loss.weight.to(DEVICE)),
        num_boxes=2,
        backend="triton",
    )
    torch.testing.assert_close(torch.stack(found).cpu(), torch.stack(expected))


@pytest.mark.parametrize("class_loss", [CrossEntropy(), Focal()])
@pytest.mark.parametrize("name", ["odd sizes", "more targets than queries", "no targets at all"])
def test_padding_changes_nothing(name: str, class_loss: ClassLoss) -> None:
    case = make_case(SIZES[name])
    query_of_target = match(case)
    wide = Case(case.logits, case.boxes, padded(case.targets, 5))
    on_device = moved(wide, DEVICE)
    queries = torch.nn.functional.pad(query_of_target, (0, 5), value=-1).to(DEVICE)
    found = set_loss(*on_device, queries, class_loss, num_boxes=3, backend="triton")
    expected = set_loss(*moved(case, DEVICE), query_of_target.to(DEVICE), class_loss, num_boxes=3, backend="triton")
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("label", [4, -1, 2**40])
@pytest.mark.parametrize("class_loss", [CrossEntropy(), Focal()])
def test_a_label_out_of_range_reads_nothing_and_shows(label: int, class_loss: ClassLoss) -> None:
    case = moved(make_case(Shape(2, 6, 4, [3, 2])), DEVICE)
    case.targets.labels[3] = label
    query_of_target = torch.tensor([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1]], device=DEVICE)
    found = set_loss(*case, query_of_target, class_loss, num_boxes=5, backend="triton")
    assert found.loss_ce.isnan().all() and found.loss_bbox.isfinite().all()


def test_what_is_no_number_stays_in_its_layer() -> None:
    case = moved(make_case(Shape(3, 20, 40, [3, 2])), DEVICE)
    case.logits[1][1, 7, 33] = math.nan
    query_of_target = torch.arange(5, device=DEVICE).expand(3, 5)
    found = set_loss(*case, query_of_target, num_boxes=5, backend="triton")
    assert found.loss_ce.isnan().tolist() == [False, True, False]


def test_without_gradients_the_losses_are_the_same() -> None:
    logits, boxes, targets = moved(make_case(Shape(2, 20, 40, [3, 2])), DEVICE)
    query_of_target = torch.arange(5, device=DEVICE).expand(2, 5)
    expected = set_loss(logits, boxes, targets, query_of_target, num_boxes=5, backend="triton")
    logits = [x.clone().requires_grad_() for x in logits]
    found = set_loss(logits, boxes, targets, query_of_target, num_boxes=5, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_queries_have_a_target() -> None:
    logits, boxes, _ = moved(make_case(Shape(1, 20, 40, [0, 0])), DEVICE)
    targets = PackedTargets(torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.zeros(0, 4, device=DEVICE), [0, 0])
    found = set_loss(logits, boxes, targets, targets.labels.new_zeros(1, 0), num_boxes=1, backend="triton")
    assert found.loss_bbox.item() == found.loss_giou.item() == 0 and found.class_error.item() == 100
