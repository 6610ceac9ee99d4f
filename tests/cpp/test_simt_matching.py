"""csrc/cuda/matching.cu, run on the host with its lanes in random order, against the reference."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpp.simt_matching import PLACEMENTS, HostModule, run_on_host
from ops.matching_cases import DETR, FOCAL, SHAPES, Case, Shape, check_optimal, double, make_case, padded

from detr_fast.ops.matching.reference import matching_reference
from detr_fast.ops.matching_cost.types import CostWeights

ROOT = Path(__file__).parents[2]
FLAGS = ("-O1", "-D__CUDACC__", "-shared", "-fPIC")
SOURCES = ["tests/cpp/simt/matching.cpp", "tests/cpp/simt/simt.cpp"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def library(compile_cpp: Callable[..., Path]) -> Path:
    return compile_cpp("simt_matching.so", SOURCES, *FLAGS, f"-I{ROOT}/tests/cpp/simt", f"-I{ROOT}/csrc/cuda")


@pytest.fixture()
def module(library: Path) -> HostModule:
    return HostModule(library)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [DETR, FOCAL], ids=["softmax", "focal"])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "real"])
def test_matches_the_reference(
    module: HostModule, name: str, weights: CostWeights, dtype: torch.dtype, placement: str
) -> None:
    case = make_case(SHAPES[name], dtype)
    found, nonfinite = run_on_host(module, case, weights, shared_limit=PLACEMENTS[placement])
    check_optimal(found, case, weights)
    assert not nonfinite.any()
    if dtype == torch.float64:
        assert torch.equal(found, matching_reference(*case, weights)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_size(module: HostModule, dtype: torch.dtype) -> None:
    case = make_case(SHAPES["real"]._replace(layers=2), dtype)
    check_optimal(run_on_host(module, case, DETR)[0], case, DETR)


@pytest.mark.parametrize("logit_dtype", DTYPES, ids=str)
def test_each_kind_of_number_has_its_own_dtype(module: HostModule, logit_dtype: torch.dtype) -> None:
    shape = Shape(2, 21, 6, [4, 30])
    logits, _, targets = make_case(shape, logit_dtype)
    boxes = make_case(shape, torch.float16).boxes
    case = Case(logits, boxes, targets._replace(boxes=targets.boxes.double()))
    extra = [torch.randn(34, 21, dtype=torch.bfloat16) for _ in range(2)]
    found, nonfinite = run_on_host(module, case, DETR, extra)
    expected, _ = matching_reference(*double(case), DETR, [x.double() for x in extra])
    assert torch.equal(found, expected)
    assert not nonfinite.any()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("counts", [[5, 0, 3], [9, 20]])
def test_costs_that_are_no_numbers_are_counted_and_matched_last(
    module: HostModule, counts: list[int], placement: str
) -> None:
    case = make_case(Shape(2, 9, 4, counts), torch.float64)
    case.logits[0][0, 2:5] = torch.nan
    case.boxes[1][1, 1, 2] = torch.inf
    case.targets.boxes[1] = -1e35
    found, nonfinite = run_on_host(module, case, DETR, shared_limit=PLACEMENTS[placement])
    expected, expected_nonfinite = matching_reference(*case, DETR)
    assert nonfinite.sum() > 9
    assert torch.equal(nonfinite, expected_nonfinite)
    usable = [q for q in range(9) if q not in (2, 3, 4)]
    assert set(usable) & set(found[0, : counts[0]].tolist()) != set()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("weights", [DETR, FOCAL], ids=["softmax", "focal"])
def test_a_label_out_of_range_makes_costs_that_are_no_numbers(module: HostModule, weights: CostWeights) -> None:
    case = make_case(Shape(2, 8, 5, [4, 2]), torch.float64)
    case.targets.labels[:3] = torch.tensor([5, -1, 2**60])
    found, nonfinite = run_on_host(module, case, weights)
    assert nonfinite.tolist() == [[24, 0], [24, 0]]
    valid = case.targets.labels.clamp(0, 4)
    expected, _ = matching_reference(*case._replace(targets=case.targets._replace(labels=valid)), weights)
    assert torch.equal(found[:, 4:], expected[:, 4:])
    assert all(len(set(row[:4].tolist())) == 4 and row.min() >= 0 for row in found)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "real"])
def test_padded_targets(module: HostModule, name: str, placement: str) -> None:
    case, limit = make_case(SHAPES[name], torch.float64), PLACEMENTS[placement]
    expected, expected_nonfinite = matching_reference(*case, DETR)
    targets = padded(case.targets, 5)
    # The largest problem that memory is taken for need not be there.
    for most in (targets.most, targets.most + 9):
        wide = case._replace(targets=targets._replace(most=most))
        found, nonfinite = run_on_host(module, wide, DETR, shared_limit=limit)
        assert torch.equal(found[:, :-5], expected) and (found[:, -5:] == -1).all()
        assert torch.equal(nonfinite, expected_nonfinite)


def test_padded_targets_of_several_launches(module: HostModule) -> None:
    case = make_case(Shape(17, 3, 2, torch.randint(0, 3, (800,)).tolist()), torch.float64)
    case = Case(case.logits[:2], case.boxes[:2], case.targets)
    found, _ = run_on_host(module, case._replace(targets=padded(case.targets, 1)), DETR)
    assert torch.equal(found[:, :-1], matching_reference(*case, DETR)[0])


def test_offsets_that_lie_read_and_write_nothing_outside(module: HostModule) -> None:
    case = make_case(Shape(1, 8, 5, [3, 2, 4]), torch.float64)
    targets = padded(case.targets, 0)
    for offsets in ([0, 3, 5, 2**40], [-5, 3, 5, 9], [0, 9, 9, 9], [9, 5, 3, 0]):
        lying = targets._replace(offsets=torch.tensor(offsets))
        found, _ = run_on_host(module, case._replace(targets=lying), DETR, shared_limit=PLACEMENTS["workspace"])
        assert ((found >= -1) & (found < 8)).all()


def test_no_queries(module: HostModule) -> None:
    found, nonfinite = run_on_host(module, make_case(Shape(1, 0, 3, [2, 0])), DETR)
    assert (found.tolist(), nonfinite.tolist()) == ([[-1, -1]], [[0, 0]])


@pytest.mark.parametrize(("layers", "images"), [(18, 2), (1, 800)])
def test_a_batch_of_several_launches(module: HostModule, layers: int, images: int) -> None:
    counts = torch.randint(0, 3, (images,)).tolist()
    case = make_case(Shape(layers, 3, 2, counts), torch.float64)
    for placement in ("all shared", "workspace"):
        found, _ = run_on_host(module, case, DETR, shared_limit=PLACEMENTS[placement])
        assert torch.equal(found, matching_reference(*case, DETR)[0])


def test_half_types_are_read_as_torch_reads_them(module: HostModule) -> None:
    floats = [torch.empty(65536) for _ in range(2)]
    module.library.simt_widen_all(*(ctypes.c_void_p(x.data_ptr()) for x in floats))
    bits = torch.arange(65536).to(torch.uint16)
    for found, dtype in zip(floats, (torch.bfloat16, torch.float16), strict=True):
        assert torch.equal(found.nan_to_num(3), bits.view(dtype).float().nan_to_num(3))


KERNEL = ROOT / "csrc" / "cuda" / "matching.cu"
BARRIERS = [n for n, line in enumerate(KERNEL.read_text().splitlines(), 1) if line.strip() == "__syncthreads();"]


def exit_with_whether_all_is_well(module: HostModule, line: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (15, 15))  # seconds; without a race it takes one
    torch.set_num_threads(1)
    module.library.simt_set_missing_barrier(line)
    for round_ in range(30):
        case = make_case(Shape(1, 40, 9, [12, 5]), torch.float64)
        if round_ % 2:  # of the first image's targets four cannot do without a query that is no number
            case.logits[0][:, 8:] = torch.nan
        placement = PLACEMENTS["workspace" if round_ % 3 == 0 else "all shared"]
        results = zip(run_on_host(module, case, DETR, None, placement), matching_reference(*case, DETR), strict=True)
        if not all(torch.equal(found, expected) for found, expected in results):
            sys.exit(1)
    sys.exit(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("line", [None, *BARRIERS])
def test_a_missing_barrier_is_caught(module: HostModule, line: int | None) -> None:
    # In a process of its own, because a kernel that races may write anywhere, or go on for ever. The barriers of the
    # solver: test_simt_assignment.py.
    run = multiprocessing.get_context("fork").Process(
        target=exit_with_whether_all_is_well, args=(module, -1 if line is None else line)
    )
    run.start()
    run.join(60)
    assert (run.exitcode == 0) == (line is None)


def test_there_are_barriers_to_miss() -> None:
    assert len(BARRIERS) >= 4
