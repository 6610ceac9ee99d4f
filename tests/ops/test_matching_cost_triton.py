"""The Triton matching cost: its checks under the interpreter and on a GPU, its machine code, and what compiles anew.

Machine code is made without a GPU: the launches of a call on CPU tensors are recorded instead of run, and what they
would have compiled on an A100 (sm_80) and an H100 (sm_90) is compiled.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from detr_fast.ops import _triton
from detr_fast.ops.matching_cost import PackedTargets, matching_cost
from detr_fast.ops.matching_cost.api import OP
from ops.matching_cases import DETR, FOCAL, SHAPES, Case, Shape, make_case

ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).with_name("matching_cost_triton_checks.py")
NO_TRITON = _triton.why_not_importable()
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ARCHITECTURES = (80, 90)
# 128 registers leave 16 warps on a multiprocessor; a block may have 48 KiB of shared memory without asking for more.
REGISTER_BUDGET = 128
SHARED_BUDGET = 48 * 1024


@needs_triton
@pytest.mark.parametrize("interpreter", ["1", pytest.param("0", marks=needs_gpu)], ids=["interpreter", "gpu"])
def test_the_checks_hold(interpreter: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": interpreter}
    if interpreter == "1":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout) and "skipped" not in done.stdout


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Recorder:
    """In a kernel's place: notes launches instead of running them."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return lambda *arguments, **constants: self.launches.append(Launch(self.kernel, arguments, constants))


@pytest.fixture()
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from detr_fast.ops.matching_cost import triton_impl

    recorded: list[Launch] = []
    for name in ("matching_cost_fwd_kernel", "matching_cost_finish_kernel"):
        monkeypatch.setattr(triton_impl, name, Recorder(getattr(triton_impl, name), recorded))
    return recorded


def specialization(launch: Launch, backend: Any) -> dict[str, tuple[Any, Any]]:
    """Of every argument: its type, and the constant or the property that a kernel is compiled for."""
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, special, _ = binder(*launch.arguments, **launch.constants)
    return dict(zip(bound, special, strict=True))


def backend_of(architecture: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget("cuda", architecture, 32))


def compile_launch(launch: Launch, architecture: int) -> Any:
    import triton
    from triton.compiler import ASTSource

    backend = backend_of(architecture)
    special = list(specialization(launch, backend).items())
    constants = {(i,): value for i, (_, (kind, value)) in enumerate(special) if kind == "constexpr"}
    attributes = {
        (i,): backend.parse_attr(value)
        for i, (_, (kind, value)) in enumerate(special)
        if kind != "constexpr" and isinstance(value, str)
    }
    source = ASTSource(launch.kernel, {name: kind for name, (kind, _) in special}, constants, attributes)
    options = {name: value for name, value in launch.constants.items() if name not in launch.kernel.arg_names}
    return triton.compile(source, target=backend.target, options=options)


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers, and bytes of memory: STACK and LOCAL are where spilled registers go."""
    import triton.backends.nvidia

    shipped = Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump"
    tool = str(shipped) if shipped.is_file() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("needs cuobjdump, which this Triton does not ship")
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([tool, "-res-usage", str(binary)], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    assert set(found) == {"REG", "STACK", "SHARED", "LOCAL"}, report
    return found


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
