"""The matching: every backend against SciPy on the reference's float64 costs."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from detr_fast.ops import _native
from detr_fast.ops.matching import api, matching
from detr_fast.ops.matching_cost import CostWeights, PackedTargets, PaddedTargets, matching_cost
from detr_fast.ops.matching_cost import api as cost_api
from detr_fast.ops.matching_cost.native import NativeArguments
from ops.assignment_cases import needs_cuda
from ops.matching_cases import DETR, FOCAL, SHAPES, Case, Shape, check_optimal, make_case, padded

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(_native.load().module is None, reason=str(_native.load().why_not))),
]


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


@pytest.mark.parametrize("name", ["labels", "target boxes", "boxes of layer 0", "extra_cost of layer 0"])
def test_tensors_of_several_devices_are_refused(name: str) -> None:
    logits, boxes, targets = make_case(Shape(1, 4, 3, [2]))
    extra = [torch.zeros(2, 4)]
    if name == "labels":
        targets = targets._replace(labels=targets.labels.to("meta"))
    elif name == "target boxes":
        targets = targets._replace(boxes=targets.boxes.to("meta"))
    elif name == "boxes of layer 0":
        boxes = [boxes[0].to("meta")]
    else:
        extra = [extra[0].to("meta")]
    with pytest.raises(ValueError, match=f"{name} must be on cpu.*, got meta"):
        matching(logits, boxes, targets, extra_cost=extra)


needs_cuda_build = pytest.mark.skipif(
    _native.load().module is None or _native.load().module.cuda is None, reason="needs the native module with CUDA"
)


@needs_cuda_build
def test_what_runs_on_cuda() -> None:
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(1, 1, 1, device="cuda")
        assert api.OP.choose(None, logits).name == "native"
        with pytest.raises(NotImplementedError, match="no native code for cuda"):
            cost_api.OP.choose("native", logits)


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_cuda_says_is_passed_on() -> None:
    case = make_case(Shape(1, 4, 3, [2]))
    arguments = NativeArguments(*case, DETR, None, for_kernel=True)
    with pytest.raises(RuntimeError, match="matching: CUDA says: "):
        _native.module().matching_cuda_workspace(arguments.inputs, 0)
    with pytest.raises(RuntimeError, match="matching: CUDA says: "):
        _native.module().matching_cuda(arguments.inputs, arguments.dtype_codes(), arguments.padded(), 0, 0, 0, 0, 0)


def on_cuda(case: Case) -> Case:
    targets = PackedTargets(case.targets.labels.cuda(), case.targets.boxes.cuda(), case.targets.num_targets)
    return Case([x.cuda() for x in case.logits], [x.cuda() for x in case.boxes], targets)


CUDA_SHAPES = {
    **SHAPES,
    "more than shared memory holds": Shape(2, 900, 92, [300, 1000, 0]),
    "several launches": Shape(18, 5, 3, [1, 0, 7] * 300),
}


@needs_cuda
class TestCuda:
    @pytest.mark.parametrize("weights", [DETR, FOCAL], ids=["softmax", "focal"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", CUDA_SHAPES.values(), ids=CUDA_SHAPES)
    def test_equals_the_cpu(self, shape: Shape, dtype: torch.dtype, weights: CostWeights) -> None:
        case = make_case(shape, dtype)
        found = matching(*on_cuda(case), weights, backend="native")
        assert found.query_of_target.is_cuda and not found.num_nonfinite.any()
        if dtype == torch.float64:
            expected = matching(*case, weights, backend="native").query_of_target
            assert torch.equal(found.query_of_target.cpu(), expected)
        else:  # float32 costs are not rounded alike, and the best of two matchings may depend on that
            check_optimal(found.query_of_target.cpu(), case, weights)

    def test_numbers_that_are_none_are_counted_as_on_the_cpu(self) -> None:
        case = make_case(Shape(2, 20, 6, [5, 30, 0]), torch.float64)
        case.logits[0][:, 3:9] = math.nan
        case.boxes[1][1, 4] = math.inf
        found, expected = matching(*on_cuda(case), DETR, backend="native"), matching(*case, DETR, backend="native")
        assert expected.num_nonfinite.sum() > 200
        assert torch.equal(found.num_nonfinite.cpu(), expected.num_nonfinite)
        assert torch.equal(found.query_of_target.cpu(), expected.query_of_target)

    def test_a_label_out_of_range_makes_costs_that_are_no_numbers(self) -> None:
        case = make_case(Shape(1, 8, 5, [4, 2]))
        case.targets.labels[:3] = torch.tensor([5, -1, 2**60])
        found = matching(*on_cuda(case), DETR, backend="native")
        assert found.num_nonfinite.tolist() == [[24, 0]]

    def test_does_not_wait_for_the_device(self) -> None:
        case = make_case(SHAPES["real"])
        there = on_cuda(case)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = matching(*there, DETR, backend="native")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check_optimal(found.query_of_target.cpu(), case, DETR)

    def test_is_captured_and_replayed_with_other_inputs(self) -> None:
        there = on_cuda(make_case(SHAPES["real"], torch.float64))
        matching(*there, DETR, backend="native")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = matching(*there, DETR, backend="native")
        for _ in range(3):
            case = make_case(SHAPES["real"], torch.float64)
            for static, fresh in zip([*there.logits, *there.boxes], [*case.logits, *case.boxes], strict=True):
                static.copy_(fresh)
            there.targets.labels.copy_(case.targets.labels)
            there.targets.boxes.copy_(case.targets.boxes)
            graph.replay()
            expected = matching(*case, DETR)
            assert torch.equal(found.query_of_target.cpu(), expected.query_of_target)

    def test_a_replay_reads_the_counts_of_padded_targets(self) -> None:
        case = make_case(Shape(2, 10, 5, [3, 0, 6]), torch.float64)
        targets = PaddedTargets(*(x.cuda() for x in padded(case.targets, 3)[:3]), most=8)
        there = on_cuda(case)._replace(targets=targets)
        matching(*there, DETR, backend="native")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = matching(*there, DETR, backend="native")
        for counts in ([3, 0, 6], [0, 8, 1], [0, 0, 0], [4, 4, 4]):
            other = make_case(Shape(2, 10, 5, counts), torch.float64)
            for static, fresh in zip([*there.logits, *there.boxes], [*other.logits, *other.boxes], strict=True):
                static.copy_(fresh)
            fresh_targets = padded(other.targets, 12 - sum(counts))
            for static, fresh in zip(targets[:3], fresh_targets[:3], strict=True):
                static.copy_(fresh)
            graph.replay()
            expected = fresh_targets.padded(matching(*other, DETR).query_of_target)
            assert torch.equal(found.query_of_target.cpu(), expected)
