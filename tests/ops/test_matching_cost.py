"""The matching cost: every backend against the reference in float64, the reference against the formula pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from detr_fast.ops import _native
from detr_fast.ops.matching_cost import CostWeights, PackedTargets, matching_cost
from ops.matching_cases import DETR, FOCAL, SHAPES, Shape, double, make_case

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(_native.load().module is None, reason=str(_native.load().why_not))),
]
WEIGHTS = {"softmax": DETR, "focal": FOCAL, "a growing power": FOCAL._replace(gamma=-0.5)}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_native_is_as_exact_as_the_reference(shape: Shape, dtype: torch.dtype, weights: CostWeights) -> None:
    if _native.load().module is None:
        pytest.skip(str(_native.load().why_not))
    case = make_case(shape, dtype)
    exact = matching_cost(*double(case), weights, backend="reference").cost
    reference = matching_cost(*case, weights, backend="reference")
    native = matching_cost(*case, weights, backend="native")
    assert native.cost.dtype == reference.cost.dtype == torch.promote_types(dtype, torch.float32)
    assert native.cost.shape == (shape.layers, sum(shape.num_targets), shape.queries)
    if exact.numel():
        assert exact.numel() < 4 or exact.std() > 0.1, "a cost that is the same everywhere tests nothing"
        ulp = torch.finfo(native.cost.dtype).eps * exact.abs().max()
        if weights.focal and dtype == torch.float64:
            ulp = ulp / 1e-8  # the reference is the oracle here, and log(1 - p + 1e-8) magnifies p's last bit
        allowed = 2 * (reference.cost - exact).abs().max() + 4 * ulp
        assert (native.cost - exact).abs().max() <= allowed
    assert torch.equal(native.num_nonfinite, torch.zeros(shape.layers, len(shape.num_targets), dtype=torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
def test_the_focal_term_of_small_and_large_logits(backend: str, gamma: float) -> None:
    """Against the formula in float64, where neither 1 - p nor p is rounded before epsilon is added."""
    x = torch.cat([torch.linspace(-12, 12, 961), torch.tensor([-math.inf, -1e4, -90.0, 90.0, 1e4, math.inf])])
    box, weights = torch.tensor([0.5, 0.5, 0.5, 0.5]), CostWeights(1, 0, 0, True, 0.3, gamma)
    targets = PackedTargets(torch.tensor([1]), box[None], [1])
    logits = torch.stack([torch.zeros_like(x), x, torch.ones_like(x)], -1)[None]
    cost = matching_cost([logits], [box.expand(1, len(x), 4)], targets, weights, backend=backend).cost[0, 0]
    p, rest = x.double().sigmoid(), (-x.double()).sigmoid()
    exact = 0.7 * p**gamma * (rest + 1e-8).log() - 0.3 * rest**gamma * (p + 1e-8).log()
    rounded = 6e-8 / (rest + 1e-8) if backend == "reference" else 0.0  # it rounds 1 - p to 6e-8
    error = (cost - exact).abs() / (1 + exact.abs())
    assert (error <= 1e-6 + rounded).all(), (error - rounded).argmax()
    assert exact.abs().max() > 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_focal_cost_that_is_no_number_is_counted(backend: str) -> None:
    for gamma in (2.0, 1.5, 0.0):
        case = make_case(Shape(1, 40, 4, [3, 2]))
        case.targets.labels[:3] = torch.tensor([1, 2, 1])
        case.logits[0][0, 7, 1] = math.nan
        found = matching_cost(*case, FOCAL._replace(gamma=gamma), backend=backend)
        assert found.num_nonfinite.tolist() == [[2, 0]] and found.cost.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("focal", [False, True])
def test_the_formula_pair_by_pair(backend: str, focal: bool) -> None:
    case = make_case(Shape(2, 5, 6, [2, 3]), torch.float64)
    weights = CostWeights(1.5, 5, 2, focal)
    cost = matching_cost(*case, weights, backend=backend).cost
    for layer in range(2):
        for target in range(5):
            image, label = int(target >= 2), int(case.targets.labels[target])
            for query in range(5):
                logits = case.logits[layer][image, query]
                box, other = case.boxes[layer][image, query].tolist(), case.targets.boxes[target].double().tolist()
                if focal:
                    p = 1 / (1 + math.exp(-logits[label]))
                    class_term = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8) + 0.75 * p**2 * math.log(1 - p + 1e-8)
                else:
                    class_term = -math.exp(logits[label]) / sum(math.exp(x) for x in logits)
                l1 = sum(abs(a - b) for a, b in zip(box, other, strict=True))
                expected = 1.5 * class_term + 5 * l1 - 2 * giou(box, other)
                assert cost[layer, target, query].item() == pytest.approx(expected, abs=1e-6)


def giou(a: list[float], b: list[float]) -> float:
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for cx, cy, w, h in (a, b)
    )
    inner = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inner
    outer = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return inner / union - (outer - union) / outer


@pytest.mark.parametrize("backend", BACKENDS)
def test_extra_cost_is_added(backend: str) -> None:
    case = make_case(SHAPES["odd sizes"])
    extra = torch.rand(3, 25, 37)
    with_extra = matching_cost(*case, DETR, extra_cost=extra, backend=backend).cost
    torch.testing.assert_close(with_extra, matching_cost(*case, DETR, backend=backend).cost + extra)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend: str) -> None:
    case = make_case(SHAPES["odd sizes"])
    case.logits[0].mul_(1e4)
    case.logits[1].fill_(-float("inf"))[..., 0] = 0.0
    result = matching_cost(*case, DETR, backend=backend)
    exact = matching_cost(*double(case), DETR, backend="reference").cost
    torch.testing.assert_close(result.cost.double(), exact, atol=1e-5, rtol=1e-6)
    assert result.num_nonfinite.sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_cost_that_is_no_number_is_higher_than_any_matching_and_is_counted(backend: str, value: float) -> None:
    case = make_case(Shape(2, 6, 4, [3, 2]))
    case.logits[1][0, 2, 1] = value  # one class spoils the whole softmax of a query
    case.boxes[0][1, 4, 3] = value
    cost, num_nonfinite = matching_cost(*case, DETR, backend=backend)
    assert num_nonfinite.tolist() == [[0, 2], [3, 0]]
    assert cost.isfinite().all()
    others = cost[1, :3][:, [0, 1, 3, 4, 5]]
    assert cost[1, 0, 2] > others.clamp(min=0).amax(1).sum() - others.clamp(max=0).amin(1).sum()
    assert torch.equal(cost[1, :3, 2], cost[1, 0, 2].expand(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_without_area_and_identical_boxes(backend: str) -> None:
    case = make_case(Shape(1, 4, 3, [3]))
    case.boxes[0][0, :3] = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0.2], [0.4, 0.4, 0.1, 0.1]])
    case.targets.boxes[:] = case.boxes[0][0, [0, 1, 2]]
    result = matching_cost(*case, CostWeights(0, 5, 2), backend=backend)
    assert result.num_nonfinite.sum() == 0
    assert result.cost[0].diagonal()[:3].tolist() == pytest.approx([0, 0, -2], abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_bad_input(backend: str) -> None:
    logits, boxes, targets = make_case(Shape(2, 6, 4, [3, 2]))
    for changed, error, message in [
        ((logits[:1], boxes, targets), ValueError, "same L >= 1 layers, got 1 and 2"),
        ((logits, [b[..., :3] for b in boxes], targets), ValueError, r"boxes of layer 0 must be float \[2, 6, 4\]"),
        ((logits, boxes, targets._replace(num_targets=[3])), ValueError, "one count for each of 2 images, got 1"),
        ((logits, boxes, targets._replace(num_targets=[6, -1])), ValueError, "must not be negative"),
        ((logits, boxes, targets._replace(labels=targets.labels.int())), ValueError, r"labels must be int64 \[5\]"),
        (
            (logits, boxes, targets._replace(boxes=targets.boxes[:4])),
            ValueError,
            r"target boxes must be float \[5, 4\]",
        ),
        ((logits, boxes, targets._replace(labels=targets.labels + 4)), IndexError, ""),
    ]:
        with pytest.raises(error, match=message or None):
            matching_cost(*changed, DETR, backend=backend)
    with pytest.raises(ValueError, match=r"extra_cost of layer 0 must be float \[5, 6\]"):
        matching_cost(logits, boxes, targets, DETR, extra_cost=torch.zeros(2, 5, 5), backend=backend)


def test_pack_joins_the_targets_of_a_batch() -> None:
    targets = [{"labels": torch.arange(n), "boxes": torch.full((n, 4), float(n))} for n in (2, 0, 3)]
    packed = PackedTargets.pack(targets)
    assert packed.num_targets == [2, 0, 3]
    assert packed.labels.tolist() == [0, 1, 0, 1, 2] and packed.boxes[:, 0].tolist() == [2, 2, 3, 3, 3]


def test_torch_sees_one_node() -> None:
    case = make_case(SHAPES["odd sizes"])

    def run(logits: list, boxes: list, labels: torch.Tensor, target_boxes: torch.Tensor):
        return matching_cost(logits, boxes, PackedTargets(labels, target_boxes, [11, 1, 13]), DETR).cost

    arguments = (case.logits, case.boxes, case.targets.labels, case.targets.boxes)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), run(*arguments))
