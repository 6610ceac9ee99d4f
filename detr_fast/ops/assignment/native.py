"""The assignment natively: on the CPU a thread a problem (csrc/cpu), on CUDA a warp (csrc/cuda)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.assignment.reference import check_numbers, infeasible

INVALID = 2  # of Outcome in csrc/core/lsap.h


def why_not(cost: Tensor) -> str | None:
    return _native.why_not(cost.device)


def assignment_native(cost: Tensor, num_targets: Sequence[int]) -> Tensor:
    return _on_cuda(cost.detach(), list(num_targets)) if cost.is_cuda else _on_cpu(cost, num_targets)


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
        if outcome == INVALID:
            check_numbers(cost.detach()[problem, :, : num_targets[problem]], problem)
        raise ValueError(infeasible(problem))
    return query_of_target


def _on_cuda(cost: Tensor, num_targets: list[int]) -> Tensor:
    native = _native.module()
    query_of_target = cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int64)  # [P, T]
    outcomes = cost.new_empty(cost.shape[0], dtype=torch.int32)
    if cost.shape[0] == 0:
        return query_of_target
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
        outcomes.data_ptr(),
        workspace.data_ptr(),
        device,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return query_of_target
