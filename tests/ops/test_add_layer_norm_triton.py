"""The Triton add_layer_norm: its checks under the interpreter and on a GPU, its machine code, what compiles anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detr_fast.ops import add_layer_norm
from detr_fast.ops.add_layer_norm.api import OP
from detr_fast.ops.add_layer_norm.types import Inputs
from ops.add_layer_norm_cases import SHAPES, draw, make_case
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

CHECKS = Path(__file__).with_name("add_layer_norm_triton_checks.py")
# Of a thread; with four warps a multiprocessor still holds four programs.
REGISTER_BUDGET = 128
SHARED_BUDGET = 48 * 1024

# Every configuration there is, by the most columns it takes; and what a model may ask of it.
COLUMNS = (256, 512, 1024, 2048)
OPTIONS = {
    "inference": {"pos": True, "p": 0.0, "grad": False},
    "training": {"pos": True, "p": 0.1, "grad": True},
    "training without a position": {"pos": False, "p": 0.1, "grad": True},
    "training without dropout": {"pos": False, "p": 0.0, "grad": True},
}
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.bfloat16, torch.float32),
}


@needs_triton
@INTERPRETER_OR_GPU
def test_the_checks_hold(interpreter: str) -> None:
    run_checks(CHECKS, interpreter)


@pytest.fixture()
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from detr_fast.ops.add_layer_norm import triton_impl

    return record_launches(monkeypatch, triton_impl, "add_layer_norm_fwd_kernel", "add_layer_norm_bwd_kernel")


def call(rows: int, columns: int, dtypes: tuple[torch.dtype, ...], pos: bool, p: float, grad: bool) -> None:
    """The launches of a forward, and of a backward where ``grad``."""
    from detr_fast.ops.add_layer_norm import triton_impl

    x, residual = (torch.zeros(rows, columns, dtype=dtype) for dtype in dtypes)
    weight, position = torch.zeros(columns, dtype=dtypes[1]), torch.zeros(1, columns, dtype=dtypes[1])
    inputs = Inputs(x, residual, weight, draw(p))
    triton_impl.add_layer_norm_triton(inputs, weight, position if pos else None, 1e-5)
    if grad:
        statistics = torch.zeros(rows)
        triton_impl.add_layer_norm_triton_backward(
            inputs, statistics, statistics, residual.clone(), residual.clone() if pos else None
        )


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_machine_code_keeps_to_its_budget(
    columns: int, architecture: int, launches: list[Launch], tmp_path: Path
) -> None:
    call(64, columns, DTYPES["autocast"], **OPTIONS["training"])
    assert len(launches) == 2
    for launch in launches:
        check_budget(launch, architecture, tmp_path)


@needs_triton
@pytest.mark.parametrize(
    ("dtypes", "option"),
    [("float32", "training without a position"), ("bfloat16", "inference"), ("bfloat16", "training without dropout")],
)
def test_what_detr_asks_keeps_to_its_budget(dtypes: str, option: str, launches: list[Launch], tmp_path: Path) -> None:
    call(64, 256, DTYPES[dtypes], **OPTIONS[option])
    for launch in launches:
        check_budget(launch, 90, tmp_path)


def check_budget(launch: Launch, architecture: int, folder: Path) -> None:
    compiled = compile_launch(launch, architecture)
    assert f".target sm_{architecture}" in compiled.asm["ptx"]
    used = resources(compiled, folder)
    assert used["REG"] <= REGISTER_BUDGET, (launch.kernel.__name__, launch.constants, used)
    assert used["STACK"] == used["LOCAL"] == 0, (launch.kernel.__name__, launch.constants, used)
    assert used["SHARED"] <= SHARED_BUDGET and compiled.metadata.shared <= SHARED_BUDGET


@needs_triton
def test_the_configurations_are_those_compiled() -> None:
    from detr_fast.ops.add_layer_norm import triton_impl

    def launched_with(columns: int) -> tuple[int, int, int]:
        x = torch.zeros(1, columns)
        constants = triton_impl.constants_of(Inputs(x, x, x[0], None))
        return constants["BLOCK_N"], constants["BLOCK_D"], constants["num_warps"]

    compiled = {launched_with(columns) for columns in COLUMNS}
    assert {launched_with(columns) for columns in range(1, 2049)} == compiled


@needs_triton
def test_no_number_of_rows_compiles_anew(launches: list[Launch]) -> None:
    backend = backend_of(80)
    for rows in (1, 2, 15, 16, 300, 4096):
        call(rows, 256, DTYPES["autocast"], **OPTIONS["training"])
    kinds: dict[str, set[str]] = {}
    for launch in launches:
        kinds.setdefault(launch.kernel.__name__, set()).add(str(specialization(launch, backend)))
    assert {name: len(found) for name, found in kinds.items()} == dict.fromkeys(kinds, 1), kinds
    assert len(kinds) == 2


@needs_triton
@needs_gpu
class TestOnAGpu:
    def test_nothing_waits(self) -> None:
        case, dropout = make_case(SHAPES["real"], device="cuda"), draw(0.1, "cuda")
        assert OP.choose(None, case.x).name == "triton"

        def step() -> None:
            y, y_pos = add_layer_norm(*case[:4], dropout=dropout, pos=case.pos)
            (y * 2 + y_pos).sum().backward()

        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_captured_graph_replays_with_another_seed(self) -> None:
        case, dropout = make_case(SHAPES["real"], device="cuda"), draw(0.1, "cuda")
        add_layer_norm(*case[:4], dropout=dropout)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = add_layer_norm(*case[:4], dropout=dropout)
        dropout.seed.add_(1)
        graph.replay()
        assert torch.equal(captured, add_layer_norm(*case[:4], dropout=dropout))
