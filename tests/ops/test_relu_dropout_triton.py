"""The Triton relu_dropout: its checks under the interpreter and on a GPU, its machine code, and what compiles anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detr_fast.ops.dropout import Dropout
from ops.triton_machine_code import (
    ARCHITECTURES,
    INTERPRETER_OR_GPU,
    Launch,
    backend_of,
    compile_launch,
    needs_triton,
    record_launches,
    resources,
    run_checks,
    specialization,
)

CHECKS = Path(__file__).with_name("relu_dropout_triton_checks.py")
REGISTER_BUDGET = 64  # of a thread: a multiprocessor is full of programs
SHARED_BUDGET = 16 * 1024


@needs_triton
@INTERPRETER_OR_GPU
def test_the_checks_hold(interpreter: str) -> None:
    run_checks(CHECKS, interpreter)


@pytest.fixture()
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from detr_fast.ops.relu_dropout import triton_impl

    return record_launches(monkeypatch, triton_impl, "relu_dropout_fwd_kernel", "relu_dropout_bwd_kernel")


def call(rows: int, dtype: torch.dtype) -> None:
    from detr_fast.ops.relu_dropout import triton_impl

    x, dropout = torch.zeros(rows, 2048, dtype=dtype), Dropout.draw(0.1, torch.device("cpu"))
    y = triton_impl.relu_dropout_triton(x, dropout)
    triton_impl.relu_dropout_triton_backward(x, y, dropout.scale)


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_machine_code_keeps_to_its_budget(
    dtype: torch.dtype, architecture: int, launches: list[Launch], tmp_path: Path
) -> None:
    call(64, dtype)
    assert len(launches) == 2
    for launch in launches:
        compiled = compile_launch(launch, architecture)
        assert f".target sm_{architecture}" in compiled.asm["ptx"]
        used = resources(compiled, tmp_path)
        assert used["REG"] <= REGISTER_BUDGET, used
        assert used["STACK"] == used["LOCAL"] == 0, used
        assert used["SHARED"] <= SHARED_BUDGET and compiled.metadata.shared <= SHARED_BUDGET


@needs_triton
def test_no_number_of_rows_compiles_anew(launches: list[Launch]) -> None:
    for rows in (1, 15, 16, 300):
        call(rows, torch.bfloat16)
    for name in ("relu_dropout_fwd_kernel", "relu_dropout_bwd_kernel"):
        kinds = {str(specialization(x, backend_of(80))) for x in launches if x.kernel.__name__ == name}
        assert len(kinds) == 1, kinds
