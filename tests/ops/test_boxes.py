"""Box formats, IoU and GIoU: against known values, an independent computation, and the original's gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from detr_fast.ops.boxes import (
    box_area,
    cxcywh_to_xyxy,
    elementwise_giou,
    elementwise_iou,
    pairwise_giou,
    pairwise_iou,
    xyxy_to_cxcywh,
)


def random_boxes_xyxy(*shape: int) -> Tensor:
    low, size = torch.rand(*shape, 2, dtype=torch.float64), torch.rand(*shape, 2, dtype=torch.float64)
    return torch.cat((low, low + size), -1)


def rasterised_iou_and_giou(a: Tensor, b: Tensor, cells: int = 40) -> tuple[float, float]:
    """By counting cells of a grid on which both boxes' corners lie."""
    x, y = np.meshgrid(np.arange(cells) + 0.5, np.arange(cells) + 0.5)

    def inside(box: Tensor) -> np.ndarray:
        return (x > box[0].item()) & (x < box[2].item()) & (y > box[1].item()) & (y < box[3].item())

    union, intersection = (inside(a) | inside(b)).sum(), (inside(a) & inside(b)).sum()
    around = inside(torch.cat((torch.minimum(a, b)[:2], torch.maximum(a, b)[2:]))).sum()
    return intersection / union, intersection / union - (around - union) / around


def test_giou_has_the_published_values(known_answers: dict) -> None:
    for case in known_answers["giou"]["cases"]:
        boxes = torch.tensor(case["boxes_xyxy"], dtype=torch.float64)
        other = torch.tensor(case.get("other_xyxy", case["boxes_xyxy"]), dtype=torch.float64)
        expected = torch.tensor(case["giou"], dtype=torch.float64)
        torch.testing.assert_close(pairwise_giou(boxes, other), expected, atol=case["atol"], rtol=0)


def test_iou_and_giou_agree_with_counting_cells() -> None:
    for _ in range(50):
        low, size = torch.randint(0, 20, (2, 2)), torch.randint(1, 20, (2, 2))
        a, b = torch.cat((low, low + size), -1).double()
        iou, giou = rasterised_iou_and_giou(a, b)
        assert elementwise_iou(a, b).item() == pytest.approx(iou, abs=1e-12)
        assert elementwise_giou(a, b).item() == pytest.approx(giou, abs=1e-12)


def test_pairwise_is_elementwise_of_all_pairs() -> None:
    a, b = random_boxes_xyxy(3, 7), random_boxes_xyxy(3, 5)
    assert pairwise_iou(a, b).shape == (3, 7, 5)
    for i in range(7):
        for j in range(5):
            torch.testing.assert_close(pairwise_iou(a, b)[:, i, j], elementwise_iou(a[:, i], b[:, j]))
            torch.testing.assert_close(pairwise_giou(a, b)[:, i, j], elementwise_giou(a[:, i], b[:, j]))
    assert pairwise_giou(a, b[:, :0]).shape == (3, 7, 0)


def test_formats_are_inverse() -> None:
    boxes_xyxy = random_boxes_xyxy(4, 6)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes_xyxy)), boxes_xyxy)
    torch.testing.assert_close(cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6])), torch.tensor([0.4, 0.1, 0.6, 0.7]))
    torch.testing.assert_close(box_area(torch.tensor([1.0, 2, 4, 7])), torch.tensor(15.0))


def test_boxes_without_area_give_no_nan() -> None:
    point = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    line = torch.tensor([0.2, 0.5, 0.8, 0.5])
    for other in (point.detach(), line, torch.tensor([0.1, 0.1, 0.2, 0.2])):
        giou = elementwise_giou(point, other)
        giou.backward()
        assert giou.isfinite()
        assert point.grad is not None and point.grad.isfinite().all()
        point.grad = None
    assert elementwise_giou(point, point).item() == 0


def test_giou_gradient() -> None:
    a, b = random_boxes_xyxy(20).requires_grad_(), random_boxes_xyxy(20).requires_grad_()
    assert torch.autograd.gradcheck(elementwise_giou, (a, b))


@pytest.mark.parametrize("function", [cxcywh_to_xyxy, xyxy_to_cxcywh, box_area])
def test_rejects_a_wrong_shape(function) -> None:
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 4\], got \[3, 5\]"):
        function(torch.zeros(3, 5))
