"""The quick calls of matching, criterion and targets: what they take, and that they do what the ordinary way does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from small import random_targets
from torch import Tensor

from detr_fast.data.target_batch import TargetBatch
from detr_fast.ops import CostWeights, PackedTargets, _native, matching, set_criterion
from detr_fast.ops.set_loss import CrossEntropy
from ops.matching_cases import DETR, FOCAL, SHAPES, Case, Shape, make_case

quick = _native.load().quick
pytestmark = pytest.mark.skipif(quick is None, reason="no native module, or a torch without quick calls")
REAL = SHAPES["real"]


@pytest.fixture()
def ordinary() -> Iterator[Callable[[], mock._patch]]:
    """A context in which nothing takes the quick way."""
    native = _native.load()._replace(quick=None)
    return lambda: mock.patch.object(_native, "load", lambda: native)


def of_dtype(shape: Shape, dtype: torch.dtype) -> Case:
    case = make_case(shape, dtype)
    return case._replace(targets=case.targets._replace(boxes=case.targets.boxes.to(dtype)))


def losses_and_gradients(case: Case, weights: CostWeights = DETR) -> list[Tensor]:
    """Of the native criterion, with other factors for each loss; then the matching."""
    leaves = [x.detach().requires_grad_() for x in (*case.logits, *case.boxes)]
    layers = len(case.logits)
    class_loss = CrossEntropy(weight=torch.linspace(0.1, 1, case.logits[0].shape[2], dtype=case.logits[0].dtype))
    found = set_criterion(leaves[:layers], leaves[layers:], case.targets, weights, class_loss, num_boxes=3.7)
    sum((i + 1) * x.sum() for i, x in enumerate(found.losses[:3])).backward()  # type: ignore[union-attr]
    return [x.detach() for x in found.losses] + [x.grad for x in leaves] + list(found.matching)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [DETR, FOCAL], ids=["softmax", "focal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_results_are_those_of_the_ordinary_way(shape: Shape, weights: CostWeights, dtype, ordinary) -> None:
    case = of_dtype(shape, dtype)
    assert quick.matching(*case, weights) is not None
    results, matched = losses_and_gradients(case, weights), matching(*case, weights)
    with ordinary():
        expected, expected_matched = losses_and_gradients(case, weights), matching(*case, weights)
    for ours, theirs in zip((*results, *matched), (*expected, *expected_matched), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def changed(case: Case, **changes: object) -> Case:
    return case._replace(targets=case.targets._replace(**changes))


UNUSUAL: dict[str, Callable[[Case], tuple[object, ...]]] = {
    "another dtype": lambda c: ([x.bfloat16() for x in c.logits], *c[1:]),
    "boxes of another dtype": lambda c: (c[0], [x.double() for x in c.boxes], c[2]),
    "layers that lie differently": lambda c: ([c.logits[0].contiguous(), *c.logits[1:]], *c[1:]),
    "classes apart": lambda c: ([x.transpose(1, 2).contiguous().transpose(1, 2) for x in c.logits], *c[1:]),
    "a layer less": lambda c: (c.logits[1:], *c[1:]),
    "no layers": lambda c: ([], [], c[2]),
    "no queries": lambda c: ([x[:, :0] for x in c.logits], [x[:, :0] for x in c.boxes], c[2]),
    "three numbers a box": lambda c: (c[0], [x[..., :3] for x in c.boxes], c[2]),
    "an image less": lambda c: ([x[1:] for x in c.logits], *c[1:]),
    "no tensors": lambda c: ([x.numpy() for x in c.logits], *c[1:]),
    "on another device": lambda c: ([x.to("meta") for x in c.logits], *c[1:]),
    "a subclass": lambda c: ([torch.nn.Parameter(x) for x in c.logits], *c[1:]),
    "a label that is no class": lambda c: changed(c, labels=c.targets.labels + 100),
    "a negative label": lambda c: changed(c, labels=c.targets.labels - 100),
    "labels of another dtype": lambda c: changed(c, labels=c.targets.labels.int()),
    "a box less": lambda c: changed(c, boxes=c.targets.boxes[1:]),
    "boxes apart": lambda c: changed(c, boxes=c.targets.boxes.t().contiguous().t()),
    "a target more": lambda c: changed(c, num_targets=[8, 3, 20, 1]),
    "a negative count": lambda c: changed(c, num_targets=[-1, 11, 20, 1]),
    "a count too large": lambda c: changed(c, num_targets=[2**70, 3, 20, 1]),
    "a count of another kind": lambda c: changed(c, num_targets=[7.0, 3, 20, 1]),
    "targets that are no tuple": lambda c: (c[0], c[1], None),
}


@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_is_left_to_the_ordinary_way(unusual) -> None:
    case, number, weight = make_case(REAL), torch.tensor(3.7), torch.rand(92)
    assert quick.matching(*case, DETR) is not None
    assert quick.criterion(*case, DETR, weight, number, True) is not None
    arguments = unusual(case)
    assert quick.matching(*arguments, DETR) is None
    assert quick.criterion(*arguments, DETR, weight, number, True) is None


def test_so_are_unusual_weights_and_numbers() -> None:
    case, number, weight = make_case(REAL), torch.tensor(3.7), torch.rand(92)
    for weights in (DETR[:5], None, DETR._replace(focal=0), DETR._replace(cost_class="1"), (10**400, *DETR[1:])):
        assert quick.matching(*case, weights) is None
    assert quick.matching(*case) is None and quick.criterion(*case) is None and quick.backward() is None
    for other in (weight[1:], weight.double(), torch.rand(184)[::2], weight[None], None):
        assert quick.criterion(*case, DETR, other, number, True) is None
    for other in (torch.rand(2), torch.tensor(3), 3.7):
        assert quick.criterion(*case, DETR, weight, other, True) is None
    losses, _, *slopes, _, _ = quick.criterion(*case, DETR, weight, number, True)
    numbers = losses.flatten().unbind()
    for arguments in (
        (losses[:2], *slopes),
        (losses.double(), *slopes),
        (losses[:, :5], *slopes),
        (losses.t(), *slopes),
        (numbers[1:], *slopes),
        ((*numbers[1:], losses[0]), *slopes),
        ((*numbers[1:], numbers[0].double()), *slopes),
        ((*numbers[1:], 1.0), *slopes),
    ):
        assert quick.backward(*arguments) is None
    assert quick.backward(losses, slopes[0], slopes[1], slopes[2][..., :3].contiguous()) is None
    assert quick.backward(losses, *slopes) is True


def test_gradients_of_single_losses_are_as_those_of_all() -> None:
    case, number, weight = make_case(REAL), torch.tensor(3.7), torch.rand(92)
    losses, _, *slopes, _, _ = quick.criterion(*case, DETR, weight, number, True)
    upstream = torch.rand_like(losses)
    upstream[1, 2] = upstream[0, 0] = 0
    numbers = [None if place in (0, 6 + 2) else x for place, x in enumerate(upstream.flatten().unbind())]
    expected = [x.clone() for x in slopes]
    assert quick.backward(upstream, *expected) and quick.backward(tuple(numbers), *slopes)
    assert torch.equal(slopes[0], expected[0]) and torch.equal(slopes[1], expected[1])


def test_without_gradients_none_are_computed() -> None:
    _, _, *slopes, _, _ = quick.criterion(*make_case(REAL), DETR, torch.rand(92), torch.tensor(3.7), False)
    assert [x.numel() for x in slopes] == [0, 0, 0]


def test_a_gradient_that_is_held_stays_and_memory_of_one_that_is_not_is_used_again() -> None:
    def logit_slope(case: Case) -> Tensor:
        return quick.criterion(*case, DETR, torch.ones(92), torch.tensor(3.7), True)[2]

    case, other = make_case(REAL), make_case(REAL)
    held = logit_slope(case)[3]
    expected = held.clone()
    places = set()
    for _ in range(20):
        found = logit_slope(other)
        places.add(found.data_ptr())
        assert not torch.equal(found[3], expected)
    assert torch.equal(held, expected)
    assert len(places) < 10  # fresh memory would lie anywhere; two pieces take turns here


def test_threads_do_not_share_memory() -> None:
    cases = [make_case(REAL) for _ in range(4)]
    expected = [losses_and_gradients(case) for case in cases]
    wrong: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(25):
            found = losses_and_gradients(cases[number])
            if not all(torch.equal(x, y) for x, y in zip(found, expected[number], strict=True)):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class TestPack:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0], [1], [9] * 70])
    def test_is_what_the_ordinary_way_packs(self, counts: list[int], dtype: torch.dtype) -> None:
        targets = [target | {"boxes": target["boxes"].to(dtype)} for target in random_targets(counts)]
        expected = PackedTargets.pack(targets)
        for each in (targets, TargetBatch.of(targets)):
            found = PackedTargets(*quick.pack(each, 5))
            assert torch.equal(found.labels, expected.labels) and torch.equal(found.boxes, expected.boxes)
            assert (found.boxes.dtype, found.num_targets) == (dtype, counts)

    def test_any_strides(self) -> None:
        (target,) = random_targets([6])
        apart = {"labels": target["labels"].repeat(2).view(2, 6).t().contiguous()[:, 1]}
        apart["boxes"] = target["boxes"].t().contiguous().t()
        labels, boxes, _ = quick.pack([apart], 5)
        assert torch.equal(labels, target["labels"]) and torch.equal(boxes, target["boxes"])

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: {"labels": t["labels"]},
            lambda t: {"boxes": t["boxes"]},
            lambda t: t | {"labels": t["labels"].int()},
            lambda t: t | {"labels": t["labels"][1:]},
            lambda t: t | {"labels": t["labels"][:, None]},
            lambda t: t | {"labels": t["labels"].tolist()},
            lambda t: t | {"labels": t["labels"] + 5},
            lambda t: t | {"labels": t["labels"] - 5},
            lambda t: t | {"boxes": t["boxes"].double()},
            lambda t: t | {"boxes": t["boxes"].bfloat16()},
            lambda t: t | {"boxes": t["boxes"][:, :3]},
            lambda t: t | {"boxes": t["boxes"].to("meta")},
            lambda t: t | {"boxes": t["boxes"] * torch.tensor([1, 1, -1, 1])},
            lambda t: t | {"boxes": t["boxes"] * 640},
            lambda t: t | {"boxes": t["boxes"] + torch.tensor([1.1, 0, 0, 0])},
            lambda t: t | {"boxes": t["boxes"] - torch.tensor([0, 1.1, 0, 0])},
            lambda t: t | {"boxes": t["boxes"] * torch.tensor([1, torch.nan, 1, 1])},
            lambda t: t | {"boxes": t["boxes"] * torch.tensor([1, 1, torch.inf, 1])},
            lambda t: list(t.items()),
        ],
    )
    def test_anything_else_is_left_to_the_ordinary_way(self, change) -> None:
        good, other = random_targets([3, 4])
        assert quick.pack([good, other], 5) is not None
        assert quick.pack([good, change(other)], 5) is None

    def test_so_are_other_arguments(self) -> None:
        targets = random_targets([3])
        for arguments in (([], 5), (tuple(targets), 5), (targets, -1), (targets, 2**70), (targets, 5.0), (targets,)):
            assert quick.pack(*arguments) is None
