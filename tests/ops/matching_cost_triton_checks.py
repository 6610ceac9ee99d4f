"""What is asked of the Triton matching cost wherever it can run: on a GPU, or without one under Triton's interpreter.

The interpreter has to be chosen before the kernels are imported, so ``test_matching_cost_triton.py`` runs this file in
a process of its own. Not collected by name.
"""

from __future__ import annotations

import math

import pytest
import torch

from detr_fast.ops import _native
from detr_fast.ops.matching_cost import CostWeights, PackedTargets, matching_cost
from detr_fast.ops.matching_cost.triton_impl import IMAGES_PER_LAUNCH, LAYERS_PER_LAUNCH
from ops.matching_cases import DETR, FOCAL, SHAPES, Case, Shape, double, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes a tenth of a second for a program: of the real size, one layer.
SIZES = SHAPES | {
    "real": Shape(1, 100, 92, [7, 3, 20, 1]),
    "more classes than a block": Shape(1, 17, 131, [17]),
    "more images than a launch": Shape(1, 2, 3, [i % 3 for i in range(IMAGES_PER_LAUNCH + 2)]),
    "more layers than a launch": Shape(LAYERS_PER_LAUNCH + 1, 3, 2, [2]),
}
WEIGHTS = {"softmax": DETR, "focal": FOCAL}


def on_device(case: Case) -> Case:
    labels, boxes, num_targets = case.targets
    targets = PackedTargets(labels.to(DEVICE), boxes.to(DEVICE), num_targets)
    # Moved as they lie: strides, and layers as views of one tensor, stay as they were made.
    return case if DEVICE == "cpu" else Case(_moved(case.logits), _moved(case.boxes), targets)


def _moved(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().cuda() for x in layers}
    return [
        torch.empty(0, dtype=x.dtype, device=DEVICE).set_(
            storages[x.untyped_storage().data_ptr()], x.storage_offset(), x.shape, x.stride()
        )
        for x in layers
    ]


def run(case: Case, weights: CostWeights, extra: object = None) -> tuple[torch.Tensor, torch.Tensor]:
    cost, num_nonfinite = matching_cost(*on_device(case), weights, extra_cost=extra, backend="triton")
    assert cost.device.type == num_nonfinite.device.type == DEVICE
    return cost.cpu(), num_nonfinite.cpu()


def check(case: Case, weights: CostWeights) -> None:
    """As exact as the reference: error against it in float64 at most twice its own, plus a few ulp."""
    exact = matching_cost(*double(case), weights, backend="reference").cost
    reference = matching_cost(*case, weights, backend="reference")
    cost, num_nonfinite = run(case, weights)
    assert cost.dtype == reference.cost.dtype and cost.shape == reference.cost.shape
    assert torch.equal(num_nonfinite, torch.zeros_like(reference.num_nonfinite))
    if exact.numel():
        assert exact.numel() < 4 or exact.std() > 0.1, "a cost that is the same everywhere tests nothing"
        ulp = torch.finfo(cost.dtype).eps * exact.abs().max()
        if weights.focal and cost.dtype == torch.float64:
            ulp = ulp / 1e-8  # the reference is the oracle here, and its 1 - p loses p's last bits
        assert (cost - exact).abs().max() <= 2 * (reference.cost - exact).abs().max() + 4 * ulp


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_is_as_exact_as_the_reference(shape: Shape, weights: CostWeights) -> None:
    check(make_case(shape), weights)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["more targets than queries", "no targets in one image"])
def test_dtypes(name: str, dtype: torch.dtype, weights: CostWeights) -> None:
    check(make_case(SIZES[name], dtype), weights)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_weights_keep_their_digits(gamma: float) -> None:
    case = make_case(Shape(1, 5, 6, [2, 3]), torch.float64)
    for weights in (CostWeights(0.1, 0.3, 0.7), CostWeights(0.1, 0.3, 0.7, True, 0.3, gamma)):
        exact = matching_cost(*case, weights, backend="reference").cost
        torch.testing.assert_close(run(case, weights)[0], exact, atol=1e-11 if weights.focal else 1e-14, rtol=0)


def test_layers_that_lie_apart_and_in_any_order() -> None:
    case = make_case(SIZES["more targets than queries"])
    check(case._replace(logits=case.logits[::-1], boxes=[x.clone() for x in case.boxes]), DETR)
    check(case._replace(logits=[case.logits[0], case.logits[1].double().float()]), DETR)  # of other strides
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.logits]  # classes are not contiguous
    check(case._replace(logits=apart), DETR)


def test_extra_cost_is_added() -> None:
    case = make_case(Shape(2, 5, 4, [3, 2]))
    wide = torch.rand(2, 5, 9, device=DEVICE)
    for extra in (wide[..., 2:7], list(wide[..., 2:7].flip(0))):
        added = torch.stack(list(extra)).cpu()
        torch.testing.assert_close(run(case, DETR, extra)[0], run(case, DETR)[0] + added)


def test_large_logits_do_not_overflow() -> None:
    case = make_case(Shape(2, 5, 140, [3, 2]))
    case.logits[0].mul_(1e4)
    case.logits[1].fill_(-math.inf)[..., 135] = 0.0
    case.targets.labels[0] = 135
    cost, num_nonfinite = run(case, DETR)
    exact = matching_cost(*double(case), DETR, backend="reference").cost
    torch.testing.assert_close(cost.double(), exact, atol=1e-5, rtol=1e-6)
    assert num_nonfinite.sum() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unusable_costs_are_those_of_the_reference(value: float, dtype: torch.dtype) -> None:
    case = make_case(Shape(2, 20, 4, [3, 0, 25]), dtype)
    case.logits[1][0, 2, :] = value
    case.logits[0][2, 18, 1] = math.nan
    case.boxes[0][2, 4, 3] = value
    cost, num_nonfinite = run(case, DETR)
    reference = matching_cost(*case, DETR, backend="reference")
    assert torch.equal(num_nonfinite, reference.num_nonfinite)
    assert num_nonfinite.tolist() == [[0, 0, 50], [3, 0, 0]]
    torch.testing.assert_close(cost, reference.cost)
    others = cost[1, :3][:, [q for q in range(20) if q != 2]]
    assert cost[1, 0, 2] > others.clamp(min=0).amax(1).sum() - others.clamp(max=0).amin(1).sum()


def test_unusable_costs_of_more_images_than_a_launch() -> None:
    case = make_case(Shape(2, 2, 3, [1, 0, 2] + [0] * (IMAGES_PER_LAUNCH - 2) + [2]))
    case.logits[1][2, 1] = math.nan
    case.logits[1][-1] = math.nan
    case.boxes[0][0, 1] = math.nan
    cost, num_nonfinite = run(case, DETR)
    reference = matching_cost(*case, DETR, backend="reference")
    assert torch.equal(num_nonfinite, reference.num_nonfinite)
    assert num_nonfinite.sum(1).tolist() == [1, 6]
    torch.testing.assert_close(cost, reference.cost)


def test_a_row_of_which_nothing_is_usable() -> None:
    case = make_case(Shape(1, 6, 4, [3, 2]))
    case.logits[0][0] = math.nan
    cost, num_nonfinite = run(case, DETR)
    assert num_nonfinite.tolist() == [[18, 0]]
    torch.testing.assert_close(cost, matching_cost(*case, DETR, backend="reference").cost)


@pytest.mark.parametrize("label", [4, -1, 2**40])
def test_a_label_out_of_range_reads_nothing_and_is_counted(label: int) -> None:
    case = make_case(Shape(1, 6, 4, [3, 2]))
    case.targets.labels[3] = label
    for weights in (DETR, FOCAL):
        cost, num_nonfinite = run(case, weights)
        assert num_nonfinite.tolist() == [[0, 6]]
        assert cost[0, 3].min() > cost[0, 4].max()


def test_boxes_without_area_and_identical_boxes() -> None:
    case = make_case(Shape(1, 4, 3, [3]))
    case.boxes[0][0, :3] = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0.2], [0.4, 0.4, 0.1, 0.1]])
    case.targets.boxes[:] = case.boxes[0][0, [0, 1, 2]]
    cost, num_nonfinite = run(case, CostWeights(0, 5, 2))
    assert num_nonfinite.sum() == 0
    assert cost[0].diagonal()[:3].tolist() == pytest.approx([0, 0, -2], abs=1e-6)


def test_ties_stay_ties() -> None:
    case = make_case(Shape(1, 40, 5, [4]))
    case.logits[0][:, 20:] = case.logits[0][:, :20]
    case.boxes[0][:, 20:] = case.boxes[0][:, :20]
    case.targets.boxes[2:], case.targets.labels[2:] = case.targets.boxes[:2], case.targets.labels[:2].clone()
    cost, _ = run(case, DETR)
    assert torch.equal(cost[..., 20:], cost[..., :20])
    assert torch.equal(cost[:, 2:], cost[:, :2])


def test_it_is_what_runs_where_nothing_faster_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda: _native.Native(None, "the native module was not built"))
    case = make_case(Shape(1, 5, 4, [3]))
    default = matching_cost(*on_device(case), DETR).cost
    assert torch.equal(default.cpu(), run(case, DETR)[0])
