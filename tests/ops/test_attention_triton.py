"""The Triton attention: its checks under the interpreter and on a GPU, its machine code and choices."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

from detr_fast.ops import Dropout, TokenOffsets, attention
from detr_fast.ops.attention.api import OP
from ops.attention_cases import Shape, make_inputs
from ops.triton_machine_code import (
    INTERPRETER_OR_GPU,
    Launch,
    backend_of,
    needs_gpu,
    needs_triton,
    record_launches,
    run_checks,
    specialization,
)

CHECKS = Path(__file__).with_name("attention_triton_checks.py")
# What a block may have of a multiprocessor: on sm_80 163 KiB, on sm_90 227 KiB.
SHARED_BUDGET = {80: 163 * 1024, 90: 227 * 1024}


@needs_triton
@INTERPRETER_OR_GPU
def test_the_checks_hold(interpreter: str) -> None:
    run_checks(CHECKS, interpreter)


@needs_triton
class TestMachineCode:
    """Of every configuration that may be chosen, as recorded, and of a few as compiled now."""

    def test_the_record_is_of_these_kernels_and_of_every_configuration(self) -> None:
        from ops import attention_machine_code as machine_code

        record = machine_code.read()
        again = "run tests/ops/attention_machine_code.py again"
        assert record["sources"] == machine_code.sources_hash(), f"the kernels have changed since: {again}"
        assert set(record["rows"]) == {str(c) for c in machine_code.configurations()}, again

    def test_nothing_is_spilled_and_shared_memory_suffices(self) -> None:
        from ops import attention_machine_code as machine_code

        rows = machine_code.read()["rows"]
        for configuration in machine_code.configurations():
            registers, spilled, shared = rows[str(configuration)]
            assert 0 < registers <= 255 and spilled == 0, f"{configuration}: {registers} registers, {spilled} spilled"
            assert 0 <= shared <= SHARED_BUDGET[configuration.architecture], f"{configuration}: {shared} bytes"

    @pytest.mark.parametrize("architecture", SHARED_BUDGET)
    def test_what_is_compiled_now_is_what_was_recorded(self, architecture: int, tmp_path: Path) -> None:
        import triton

        from ops import attention_machine_code as machine_code

        record = machine_code.read()
        of_detr = {"architecture": architecture, "block_e": 32, "dropout": True, "dtype": "bfloat16"}
        found = [c for c in machine_code.configurations() if of_detr.items() <= c._asdict().items()]
        configuration = random.choice(found)
        registers, spilled, shared = machine_code.measure(configuration, tmp_path)
        assert spilled == 0 and shared <= SHARED_BUDGET[architecture], configuration
        if triton.__version__ == record["triton"]:
            assert [registers, spilled, shared] == record["rows"][str(configuration)], configuration


@pytest.fixture()
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from detr_fast.ops.attention import triton_impl

    kernels = ("fwd", "fwd_reduce", "bwd_query", "bwd_key_value")
    return record_launches(monkeypatch, triton_impl, *(f"attention_{kernel}_kernel" for kernel in kernels))


@needs_triton
def test_no_length_and_no_count_compiles_anew(launches: list[Launch]) -> None:
    from detr_fast.ops.attention.triton_impl import attention_triton, attention_triton_backward

    lengths = [[1], [16], [17, 0, 300], [128] * 8, [850, 1000, 640], [5000], [0, 1], [1] * 33]
    for queries, keys, heads in itertools.product(lengths, lengths, [1, 8]):
        if len(queries) != len(keys):
            continue
        inputs = make_inputs(Shape(heads, 32, queries, keys), torch.bfloat16, 0.1)
        out, statistics = attention_triton(inputs)
        attention_triton_backward(inputs, torch.zeros_like(out), out, statistics)
    seen: dict[str, set[str]] = {}
    for launch in launches:
        special = specialization(launch, backend_of(80))
        options = [launch.constants[name] for name in ("num_warps", "num_stages") if name in launch.constants]
        seen.setdefault(launch.kernel.__name__, set()).add(f"{special} {options}")
    # Short and long, split and not.
    assert {name: len(kinds) for name, kinds in seen.items()} == {
        "attention_fwd_kernel": 4,
        "attention_fwd_reduce_kernel": 1,
        "attention_bwd_query_kernel": 4,
        "attention_bwd_key_value_kernel": 1,
    }


@needs_triton
def test_programs_are_as_many_as_blocks(launches: list[Launch]) -> None:
    """No program for padding: the grid of images of very different lengths is the sum of theirs."""
    from detr_fast.ops.attention.triton_impl import count_blocks

    assert count_blocks(TokenOffsets.of([1, 0, 64, 65, 1000], "cpu"), 64) == 1 + 0 + 1 + 2 + 16


@needs_triton
class TestChoices:
    @pytest.fixture(autouse=True)
    def defaults(self):
        from detr_fast.ops.attention import triton_choices

        triton_choices.reset_choices()
        yield
        triton_choices.reset_choices()

    def test_are_kept_in_a_file(self, tmp_path: Path) -> None:
        from detr_fast.ops.attention import triton_choices as choices

        kind = choices.Kind("forward", 32, torch.bfloat16, True, False)
        default, *others = choices.candidates(kind)
        assert choices.choice_for(kind) == default
        choices.set_choice(kind, others[0])
        choices.save_choices(tmp_path / "choices.json")
        choices.reset_choices()
        assert choices.choice_for(kind) == default
        choices.load_choices(tmp_path / "choices.json")
        assert choices.choice_for(kind) == others[0] != default
        assert choices.choice_for(kind._replace(dropout=False)) == default

    def test_only_candidates_are_taken(self) -> None:
        from detr_fast.ops.attention import triton_choices as choices

        kind = choices.Kind("forward", 32, torch.bfloat16, True, False)
        with pytest.raises(ValueError, match=r"choice must be one of \[\(128, 64, 4, 2\), .*got \(7, 7, 7, 7\)"):
            choices.set_choice(kind, choices.Choice(7, 7, 7, 7))

    @pytest.mark.parametrize("text", ["{", "[1]", '[{"kernel": "forward"}]'])
    def test_another_file_is_refused(self, text: str, tmp_path: Path) -> None:
        from detr_fast.ops.attention import triton_choices as choices

        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other.json must be a file of save_choices"):
            choices.load_choices(tmp_path / "other.json")


class TestWhereItCannotRun:
    @needs_triton
    def test_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(NotImplementedError, match="backend='triton': Triton needs a CUDA device, got cpu"):
            attention(*make_inputs(Shape(1, 16, [2], [3]))[:5], backend="triton")

    @pytest.mark.parametrize(
        ("tensor", "reason"),
        [
            (torch.empty(1, 1, 32, dtype=torch.float64), "the kernels take float32, .* got torch.float64"),
            (torch.empty(1, 1, 129), "the kernels take heads of up to 128, got 129"),
        ],
    )
    def test_what_the_kernels_do_not_take(self, tensor: torch.Tensor, reason: str) -> None:
        with pytest.raises(NotImplementedError, match=reason):
            OP.choose("triton", tensor)


@needs_triton
@needs_gpu
class TestOnAGpu:
    def test_nothing_waits(self) -> None:
        q, k, v = (torch.randn(1500, 8, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

        def step() -> None:
            offsets = TokenOffsets.of([850, 650], "cuda")
            attention(q, k, v, offsets, offsets, dropout=Dropout.draw(0.1, q.device)).sum().backward()

        assert OP.choose(None, q).name == "triton"
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_captured_graph_replays_with_another_seed(self) -> None:
        q, k, v = (torch.randn(1500, 8, 32, device="cuda") for _ in range(3))
        offsets, dropout = TokenOffsets.of([850, 650], "cuda"), Dropout.draw(0.1, q.device)
        attention(q, k, v, offsets, offsets, dropout=dropout)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attention(q, k, v, offsets, offsets, dropout=dropout)
        dropout.seed.add_(1)
        graph.replay()
        assert torch.equal(captured, attention(q, k, v, offsets, offsets, dropout=dropout))

    def test_chosen_tiles_are_faster_or_the_default(self) -> None:
        from detr_fast.ops.attention import triton_choices
        from detr_fast.ops.attention.triton_tuning import tune_attention

        inputs = make_inputs(Shape(8, 32, [850] * 4, [850] * 4), torch.bfloat16)
        tensors = [x.cuda() for x in inputs[:3]]
        offsets = TokenOffsets.of([850] * 4, "cuda")
        chosen = tune_attention(
            inputs._replace(
                **dict(zip(("query", "key", "value"), tensors, strict=True)), query_offsets=offsets, key_offsets=offsets
            )
        )
        triton_choices.reset_choices()
        assert len(chosen) == 3
