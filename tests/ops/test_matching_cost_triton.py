"""The Triton matching cost: its checks under the interpreter and on a GPU, its machine code, and what compiles anew."""

from __future__ import annotations

import itertools
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fast.ops import _triton
from detr_fast.ops.matching_cost import PackedTargets, matching_cost
from detr_fast.ops.matching_cost.api import OP
from ops.matching_cases import DETR, FOCAL, SHAPES, Case, Shape, make_case
from ops.triton_machine_code import (
    ARCHITECTURES,
    INTERPRETER_OR_GPU,
    Launch,
    backend_of,
    compile_launch,
    needs_gpu,
    needs_triton,
    record_launches,
    resources,
    run_checks,
    specialization,
)

CHECKS = Path(__file__).with_name("matching_cost_triton_checks.py")

# 128 registers leave 16 warps on a multiprocessor; a block may have 48 KiB of shared memory without asking for more.
REGISTER_BUDGET = 128
SHARED_BUDGET = 48 * 1024


@needs_triton
@INTERPRETER_OR_GPU
def test_the_checks_hold(interpreter: str) -> None:
    run_checks(CHECKS, interpreter)


@pytest.fixture()
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from detr_fast.ops.matching_cost import triton_impl

    return record_launches(monkeypatch, triton_impl, "matching_cost_fwd_kernel", "matching_cost_finish_kernel")


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_machine_code_keeps_to_its_budget(
    dtype: torch.dtype, architecture: int, launches: list[Launch], tmp_path: Path
) -> None:
    from detr_fast.ops.matching_cost.triton_impl import matching_cost_triton

    case = make_case(SHAPES["real"], dtype)
    extra = [torch.zeros(31, 100, dtype=dtype) for _ in case.logits]
    matching_cost_triton(*case, DETR, None)
    matching_cost_triton(*case, FOCAL, extra)
    assert len(launches) == 4
    for launch in launches[:3]:
        compiled = compile_launch(launch, architecture)
        assert f".target sm_{architecture}" in compiled.asm["ptx"]
        used = resources(compiled, tmp_path)
        assert used["REG"] <= REGISTER_BUDGET, used
        assert used["STACK"] == used["LOCAL"] == 0, used
        assert used["SHARED"] <= SHARED_BUDGET and compiled.metadata.shared <= SHARED_BUDGET


@needs_triton
def test_no_size_and_no_count_compiles_anew(launches: list[Launch]) -> None:
    from detr_fast.ops.matching_cost.triton_impl import matching_cost_triton

    backend = backend_of(80)
    sizes = itertools.product([1, 2, 16], [1, 16, 300], [1, 16, 92], [[1], [16, 0], [3, 1, 7, 32]])
    for layers, queries, classes, num_targets in sizes:
        before = len(launches)
        shape = Shape(layers, queries, classes, num_targets)
        matching_cost_triton(*contiguous(make_case(shape)), DETR, None)
        assert len(launches) - before == (3 if layers > 8 else 2), "a launch for the costs of 8 layers, one to finish"
    seen: dict[str, set] = {"matching_cost_fwd_kernel": set(), "matching_cost_finish_kernel": set()}
    for launch in launches:
        seen[launch.kernel.__name__].add(str(specialization(launch, backend)))
    assert {name: len(kinds) for name, kinds in seen.items()} == dict.fromkeys(seen, 1), seen


def contiguous(case: Case) -> Case:
    # Whether an address is a multiple of 16 is compiled for; every allocation is.
    return case._replace(logits=[x.clone() for x in case.logits], boxes=[x.clone() for x in case.boxes])


class TestWhereItCannotRun:
    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: None)
        assert OP.reasons(torch.device("cpu"))["triton"] == "triton is not installed"
        with pytest.raises(NotImplementedError, match="backend='triton': triton is not installed"):
            matching_cost(*make_case(SHAPES["one class"]), DETR, backend="triton")
        assert _triton.why_not(torch.device("cuda")) == "triton is not installed"

    @needs_triton
    def test_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(NotImplementedError, match="Triton needs a CUDA device, got cpu"):
            matching_cost(*make_case(SHAPES["one class"]), DETR, backend="triton")

    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            (types.SimpleNamespace(__version__="3.2.0"), "triton 3.3 or later is needed, 3.2.0 is installed"),
            (types.SimpleNamespace(__version__="3.10.0+git1234"), None),
            (None, "triton does not load: .*triton.*"),
        ],
    )
    def test_another_triton(self, module: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "triton", module)
        found = _triton.why_not_importable.__wrapped__()
        assert found is None if reason is None else re.fullmatch(reason, found)


@needs_triton
@needs_gpu
class TestOnAGpu:
    def test_nothing_waits(self) -> None:
        case = on_gpu(make_case(SHAPES["real"]))
        first = matching_cost(*case, DETR).cost
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = matching_cost(*case, DETR).cost
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert OP.choose(None, case.logits[0]).name == "triton"
        assert torch.equal(first, second)

    def test_a_captured_graph_replays_with_other_inputs(self) -> None:
        case, other = on_gpu(make_case(SHAPES["real"])), on_gpu(make_case(SHAPES["real"]))
        matching_cost(*case, DETR, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = matching_cost(*case, DETR, backend="triton")
        for old, new in zip([*case.logits, *case.boxes], [*other.logits, *other.boxes], strict=True):
            old.copy_(new)
        case.targets.labels.copy_(other.targets.labels)
        case.targets.boxes.copy_(other.targets.boxes)
        graph.replay()
        expected = matching_cost(*other, DETR, backend="triton")
        assert torch.equal(captured.cost, expected.cost)
        assert torch.equal(captured.num_nonfinite, expected.num_nonfinite)


def on_gpu(case: Case) -> Case:
    labels, boxes, num_targets = case.targets
    targets = PackedTargets(labels.cuda(), boxes.cuda(), num_targets)
    return Case([x.cuda() for x in case.logits], [x.cuda() for x in case.boxes], targets)
