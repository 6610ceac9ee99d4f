"""Targets in padded memory, whose counts are a tensor: every op gives what it gives for the targets without padding.

The kernels are asked the same in test_simt_matching.py and set_loss_triton_checks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from detr_fast.ops import PaddedTargets, _native, matching, set_criterion, set_loss
from ops.matching_cases import DETR, SHAPES, Case, Shape, make_case, padded

BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(_native.load().module is None, reason="none"))]


def with_gradients(run: Callable[[list[Tensor], list[Tensor]], Any], case: Case) -> tuple[Tensor, ...]:
    logits, boxes = ([x.detach().requires_grad_() for x in layers] for layers in (case.logits, case.boxes))
    losses = run(logits, boxes)
    return (torch.stack(losses).detach(), *torch.autograd.grad(torch.stack(losses[:3]).sum(), [*logits, *boxes]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("room", [0, 1, 37])
@pytest.mark.parametrize("name", SHAPES)
def test_padding_changes_nothing(name: str, room: int, backend: str) -> None:
    case = make_case(SHAPES[name])
    wide = padded(case.targets, room)
    total = len(case.targets.labels)
    extra = [torch.rand(total + room, case.logits[0].shape[1]) for _ in case.logits]
    short = [x[:total] for x in extra]
    expected = matching(*case, DETR, extra_cost=short, backend=backend)
    found = matching(*case._replace(targets=wide), DETR, extra_cost=extra, backend=backend)
    assert found.query_of_target.shape == (len(case.logits), total + room)
    assert torch.equal(found.query_of_target[:, :total], expected.query_of_target)
    assert (found.query_of_target[:, total:] == -1).all()
    assert torch.equal(found.num_nonfinite, expected.num_nonfinite)

    def losses(targets: Any, queries: Tensor) -> Callable[..., Any]:
        return lambda x, y: set_loss(x, y, targets, queries, num_boxes=3, backend=backend)

    def criterion(targets: Any) -> Callable[..., Any]:
        return lambda x, y: set_criterion(x, y, targets, DETR, num_boxes=3, backend=backend).losses

    for of_padded, of_packed in (
        (losses(wide, found.query_of_target), losses(case.targets, expected.query_of_target)),
        (criterion(wide), criterion(case.targets)),
    ):
        pairs = zip(with_gradients(of_padded, case), with_gradients(of_packed, case), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_queries_of_a_criterion_are_padded() -> None:
    case = make_case(Shape(2, 5, 4, [2, 0, 1]))
    found = set_criterion(*case._replace(targets=padded(case.targets, 4)), num_boxes=3).matching
    assert found.query_of_target.shape == (2, 7) and (found.query_of_target[:, 3:] == -1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 2])}, r"offsets must be int64 \[3\] on cpu, got torch.int64 \[2\] on cpu"),
        (
            {"offsets": torch.tensor([0, 2, 3], dtype=torch.int32)},
            r"offsets must be int64 \[3\] on cpu, got torch.int32",
        ),
        ({"most": -1}, "most must not be negative, got -1"),
        ({"boxes": torch.rand(3, 4)}, r"target boxes must be float \[8, 4\], got \[3, 4\]"),
        ({"labels": torch.rand(8)}, r"labels must be int64 \[8\], got torch.float32 \[8\]"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    case = make_case(Shape(1, 5, 4, [2, 1]))
    targets = padded(case.targets, 5)._replace(**change)
    for op in (matching, lambda *arguments: set_criterion(*arguments, num_boxes=3)):
        with pytest.raises(ValueError, match=message):
            op(case.logits, case.boxes, targets)


@pytest.mark.parametrize("name", ["matching", "set_loss", "set_criterion"])
def test_a_schema_has_no_place_for_them(name: str) -> None:
    with torch._subclasses.FakeTensorMode():
        logits, boxes = [torch.empty(2, 5, 4)], [torch.empty(2, 5, 4)]
        targets = PaddedTargets(torch.zeros(8).long(), torch.empty(8, 4), torch.zeros(3).long(), 4)
        queries = torch.zeros(1, 8).long()
        calls = {
            "matching": lambda: matching(logits, boxes, targets),
            "set_loss": lambda: set_loss(logits, boxes, targets, queries, num_boxes=1),
            "set_criterion": lambda: set_criterion(logits, boxes, targets, num_boxes=1),
        }
        with pytest.raises(NotImplementedError, match=f"{name} of PaddedTargets cannot be compiled or exported"):
            calls[name]()
