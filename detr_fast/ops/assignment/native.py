"""The assignment natively: on the CPU a thread a problem (csrc/cpu), on CUDA a warp (csrc/cuda)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.assignment.report import AssignmentOutcome, AssignmentReport, check_numbers, infeasible

HALVES = (torch.float16, torch.bfloat16)


def _no_quick_assignment(cost: Tensor, num_targets: Sequence[int]) -> Tensor | None:
    """Of a torch that has no quick calls."""


# Looked up once: it takes a tenth of a small problem's time.
quick_assignment: Callable[[Tensor, Sequence[int]], Tensor | None] = getattr(
    _native.load().quick, "assignment", _no_quick_assignment
)


def why_not(cost: Tensor) -> str | None:
    return _native.why_not(cost.device)


def why_no_auction(cost: Tensor) -> str | None:
    return "the auction has no kernel for CUDA" if cost.is_cuda else why_not(cost)


def assignment_native(cost: Tensor, num_targets: Sequence[int]) -> Tensor:
    cost = widened(cost)
    if cost.is_cuda:
        return _on_cuda(cost.detach(), list(num_targets), dual_gap=None)[0]
    return _on_cpu(cost, num_targets)


def widened(cost: Tensor) -> Tensor:
    """As float32, where it has 16 bits; every number stays what it is."""
    return cost.float() if cost.dtype in HALVES else cost


def report_native(cost: Tensor, num_targets: Sequence[int], *, method: str) -> AssignmentReport:
    if cost.is_cuda:
        return report_on_cuda(cost, num_targets)
    cost = widened(cost.detach())
    query_of_target = cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int64)  # [P, T]
    outcome = cost.new_empty(cost.shape[0], dtype=torch.int32)
    dual_gap = cost.new_empty(cost.shape[0], dtype=torch.float64)
    _native.module().solve_assignment_cpu(
        cost.data_ptr(),
        cost.dtype == torch.float64,
        cost.shape,
        cost.stride(),
        num_targets,
        method == "auction",
        query_of_target.data_ptr(),
        outcome.data_ptr(),
        dual_gap.data_ptr(),
        torch.get_num_threads(),
    )
    return AssignmentReport(query_of_target, outcome, dual_gap)


def report_on_cuda(cost: Tensor, num_targets: Sequence[int]) -> AssignmentReport:
    dual_gap = cost.new_empty(cost.shape[0], dtype=torch.float64)
    return AssignmentReport(*_on_cuda(widened(cost.detach()), list(num_targets), dual_gap), dual_gap)


def _on_cpu(cost: Tensor, num_targets: Sequence[int]) -> Tensor:
    shape = cost.shape
    query_of_target = cost.new_empty((shape[0], shape[2]), dtype=torch.int64)  # [P, T]
    unsolved = _native.module().assignment_cpu(
        cost.data_ptr(),
        cost.dtype == torch.float64,
        shape,
        cost.stride(),
        num_targets,
        query_of_target.data_ptr(),
        torch.get_num_threads(),
    )
    if unsolved is not None:
        problem, outcome = unsolved
        if outcome == AssignmentOutcome.INVALID:
            check_numbers(cost.detach()[problem, :, : num_targets[problem]], problem)
        raise ValueError(infeasible(problem))
    return query_of_target


def _on_cuda(cost: Tensor, num_targets: list[int], dual_gap: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries of targets [P, T] and outcomes [P]; fills ``dual_gap``, where it is given."""
    native = _native.module()
    query_of_target = cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int64)  # [P, T]
    outcome = cost.new_empty(cost.shape[0], dtype=torch.int32)
    if cost.shape[0] == 0:
        return query_of_target, outcome
    is_double, sizes, strides = cost.dtype == torch.float64, tuple(cost.shape), cost.stride()
    device = cost.device.index
    workspace_bytes = native.assignment_cuda_workspace(is_double, sizes, strides, num_targets, device)
    workspace = cost.new_empty(workspace_bytes, dtype=torch.uint8)
    native.assignment_cuda(
        cost.data_ptr(),
        is_double,
        sizes,
        strides,
        num_targets,
        query_of_target.data_ptr(),
        outcome.data_ptr(),
        0 if dual_gap is None else dual_gap.data_ptr(),
        workspace.data_ptr(),
        device,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return query_of_target, outcome
