"""The Triton mask_loss, mask_argmax and mask_threshold: their checks, their machine code, and what compiles anew."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from detr_fast.ops import mask_loss
from ops.test_mask_argmax import everywhere
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

CHECKS = Path(__file__).with_name("masks_triton_checks.py")
REGISTER_BUDGET = 128  # of a thread: 16 warps on a multiprocessor
SHARED_BUDGET = 16 * 1024
KERNELS = ("mask_loss_fwd_kernel", "mask_loss_finish_kernel", "mask_argmax_kernel", "mask_threshold_kernel")


@needs_triton
@INTERPRETER_OR_GPU
def test_the_checks_hold(interpreter: str) -> None:
    run_checks(CHECKS, interpreter)


@pytest.fixture()
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from detr_fast.ops.mask_argmax import triton_impl as of_masks
    from detr_fast.ops.mask_loss import triton_impl as of_losses

    noted = record_launches(monkeypatch, of_losses, *KERNELS[:2])
    record_launches(monkeypatch, of_masks, *KERNELS[2:])
    for name in KERNELS[2:]:
        getattr(of_masks, name).launches = noted  # one list, in the order of the calls
    return noted


def call(masks: int, size: tuple[int, int], frame: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
    from detr_fast.ops.mask_argmax.triton_impl import mask_argmax_triton, mask_threshold_triton
    from detr_fast.ops.mask_loss.triton_impl import mask_loss_triton

    logits, places = torch.zeros(masks, *size, dtype=dtype), everywhere(size, frame)
    for with_gradients in (True, False):
        mask_loss_triton(logits, [torch.zeros(masks, *frame, dtype=torch.bool)], with_gradients)
    mask_argmax_triton(logits, *places)
    mask_threshold_triton(logits, *places, 0.5)


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_machine_code_keeps_to_its_budget(
    dtype: torch.dtype, architecture: int, launches: list[Launch], tmp_path: Path
) -> None:
    call(3, (200, 334), (800, 1333), dtype)
    assert [launch.kernel.__name__ for launch in launches] == [*KERNELS[:2], *KERNELS]
    for launch in launches:
        compiled = compile_launch(launch, architecture)
        assert f".target sm_{architecture}" in compiled.asm["ptx"]
        used = resources(compiled, tmp_path)
        assert used["REG"] <= REGISTER_BUDGET, (launch.kernel.__name__, used)
        assert used["STACK"] == used["LOCAL"] == 0, (launch.kernel.__name__, used)
        assert used["SHARED"] <= SHARED_BUDGET and compiled.metadata.shared <= SHARED_BUDGET
        assert "atom." not in compiled.asm["ptx"] and "red.global" not in compiled.asm["ptx"]


@needs_triton
def test_no_size_and_no_count_compiles_anew(launches: list[Launch]) -> None:
    for masks, size, frame in itertools.product([1, 16], [(1, 1), (16, 32), (7, 9)], [(1, 16), (64, 48), (33, 65)]):
        call(masks, size, frame)
    seen: dict[str, set] = {name: set() for name in KERNELS}
    for launch in launches:
        seen[launch.kernel.__name__].add(str(specialization(launch, backend_of(80))))
    # Losses with gradients and without.
    assert [len(seen[name]) for name in KERNELS] == [2, 2, 1, 1], seen


@needs_triton
@needs_gpu
def test_nothing_waits_on_a_gpu_and_every_bit_comes_again() -> None:
    logits = torch.randn(4, 20, 30, device="cuda", requires_grad=True)
    masks = [torch.rand(4, 80, 119, device="cuda") > 0.5]
    results = []
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            losses = mask_loss(logits, masks)
            results.append([*losses, *torch.autograd.grad(losses.mask.sum() + losses.dice.sum(), logits)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
