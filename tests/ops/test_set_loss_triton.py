"""The Triton set_loss: its checks under the interpreter and on a GPU, its machine code, and what compiles anew."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from detr_fast.ops.set_loss import ClassLoss, CrossEntropy, Focal, Varifocal, set_loss
from detr_fast.ops.set_loss.api import OP
from ops.matching_cases import Case, Shape, make_case
from ops.set_loss_cases import match, moved
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

CHECKS = Path(__file__).with_name("set_loss_triton_checks.py")
KERNELS = ("set_loss_fwd_kernel", "set_loss_finish_kernel", "set_loss_bwd_kernel")
# 128 registers leave 16 warps on a multiprocessor; float64, which nobody trains in, may take 144.
REGISTER_BUDGET = {torch.float32: 128, torch.bfloat16: 128, torch.float64: 144}
SHARED_BUDGET = 48 * 1024
REAL = Shape(6, 100, 92, [7, 3, 20, 1])


@needs_triton
@INTERPRETER_OR_GPU
def test_the_checks_hold(interpreter: str) -> None:
    run_checks(CHECKS, interpreter)


@pytest.fixture()
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from detr_fast.ops.set_loss import triton_impl

    return record_launches(monkeypatch, triton_impl, *KERNELS)


def call(case: Case, class_loss: ClassLoss, with_slopes: bool = True) -> None:
    """The launches of a forward, and of a backward where there are slopes."""
    from detr_fast.ops.set_loss.triton_impl import set_loss_backward_triton, set_loss_triton

    query_of_target = torch.zeros(len(case.logits), len(case.targets.labels), dtype=torch.int64)
    losses, _, *slopes = set_loss_triton(*case, query_of_target, class_loss, torch.tensor(3.0), with_slopes)
    if with_slopes:
        set_loss_backward_triton(losses, *slopes)


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("class_loss", [CrossEntropy(), Focal(), Varifocal(gamma=1.5)])
def test_machine_code_keeps_to_its_budget(
    class_loss: ClassLoss, dtype: torch.dtype, architecture: int, launches: list[Launch], tmp_path: Path
) -> None:
    call(make_case(REAL, dtype), class_loss)
    assert [launch.kernel.__name__ for launch in launches] == list(KERNELS)
    for launch in launches if isinstance(class_loss, CrossEntropy) else launches[:1]:
        compiled = compile_launch(launch, architecture)
        assert f".target sm_{architecture}" in compiled.asm["ptx"]
        used = resources(compiled, tmp_path)
        assert used["REG"] <= REGISTER_BUDGET[dtype], (launch.kernel.__name__, used)
        assert used["STACK"] == used["LOCAL"] == 0, (launch.kernel.__name__, used)
        assert used["SHARED"] <= SHARED_BUDGET and compiled.metadata.shared <= SHARED_BUDGET
        assert "atom." not in compiled.asm["ptx"] and "red.global" not in compiled.asm["ptx"]


@needs_triton
def test_no_size_and_no_count_compiles_anew(launches: list[Launch]) -> None:
    backend = backend_of(80)
    sizes = itertools.product([1, 2, 16], [1, 16, 300], [1, 16, 92], [[1], [16, 1], [3, 1, 7, 32]])
    for layers, queries, classes, num_targets in sizes:
        before = len(launches)
        case = make_case(Shape(layers, queries, classes, num_targets))
        # Whether an address is a multiple of 16 is compiled for; every allocation is.
        call(
            case._replace(logits=[x.clone() for x in case.logits], boxes=[x.clone() for x in case.boxes]),
            CrossEntropy(),
        )
        assert len(launches) - before == (4 if layers > 8 else 3)
    seen: dict[str, set] = {name: set() for name in KERNELS}
    for launch in launches:
        seen[launch.kernel.__name__].add(str(specialization(launch, backend)))
    assert {name: len(kinds) for name, kinds in seen.items()} == dict.fromkeys(seen, 1), seen


class TestWhereItCannotRun:
    @needs_triton
    def test_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        case = make_case(Shape(1, 4, 3, [2]))
        with pytest.raises(NotImplementedError, match="Triton needs a CUDA device, got cpu"):
            set_loss(*case, match(case), num_boxes=1, backend="triton")


@needs_triton
@needs_gpu
class TestOnAGpu:
    @pytest.mark.parametrize("class_loss", [CrossEntropy(), Focal(), Varifocal()])
    def test_nothing_waits_and_every_bit_comes_again(self, class_loss: ClassLoss) -> None:
        case = make_case(REAL)
        query_of_target = match(case).cuda()
        case = moved(case, "cuda")
        assert OP.choose(None, case.logits[0]).name == "triton"

        def gradients() -> list[torch.Tensor]:
            logits = [x.detach().requires_grad_() for x in case.logits]
            found = set_loss(logits, case.boxes, case.targets, query_of_target, class_loss, num_boxes=num_boxes)
            return [*found, *torch.autograd.grad(found.loss_ce.sum(), logits)]

        num_boxes = torch.tensor(31.0, device="cuda")
        first = gradients()
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = gradients()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_a_captured_graph_replays_with_other_inputs(self) -> None:
        case, other = make_case(REAL), make_case(REAL)
        queries, other_queries = match(case).cuda(), match(other).cuda()
        case, other = moved(case, "cuda"), moved(other, "cuda")
        num_boxes = torch.tensor(31.0, device="cuda")
        set_loss(*case, queries, num_boxes=num_boxes)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = set_loss(*case, queries, num_boxes=num_boxes)
        for old, new in zip([*case.logits, *case.boxes], [*other.logits, *other.boxes], strict=True):
            old.copy_(new)
        case.targets.labels.copy_(other.targets.labels)
        case.targets.boxes.copy_(other.targets.boxes)
        queries.copy_(other_queries)
        graph.replay()
        expected = set_loss(*other, other_queries, num_boxes=num_boxes)
        assert torch.equal(torch.stack(captured), torch.stack(expected))
