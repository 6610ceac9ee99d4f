"""What ``solve_assignment`` and ``assignment`` do with tensors on CUDA, over csrc/cuda/assignment.cu on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from cpp.test_simt_assignment import INFEASIBLE, INVALID, SOLVED, build, by_scipy

from detr_fast.ops.assignment.native import _on_cuda, report_on_cuda, widened


@pytest.fixture(scope="module")
def kernel(compile_cpp: Callable[..., Path]) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(compile_cpp, "simt_assignment_report.so")))


class HostModule:
    """Stands for detr_fast._C with CUDA."""

    def __init__(self, kernel: ctypes.CDLL) -> None:
        self.kernel = kernel
        kernel.detr_fast_assignment_cuda_workspace.restype = ctypes.c_int64

    def assignment_cuda_workspace(
        self, is_double: bool, sizes: Sequence[int], strides: Sequence[int], num_targets: list[int], device: None
    ) -> int:
        self.sizes = [(ctypes.c_int64 * len(a))(*a) for a in (sizes, strides, num_targets)]
        return self.kernel.detr_fast_assignment_cuda_workspace(is_double, *self.sizes, 0)

    def assignment_cuda(
        self, cost: int, is_double: bool, sizes: object, strides: object, num_targets: object, *addresses: int | None
    ) -> None:
        results = [ctypes.c_void_p(a) for a in addresses[:4]]
        error = self.kernel.detr_fast_assignment_cuda(
            ctypes.c_void_p(cost), is_double, *self.sizes, *results, 0, ctypes.c_void_p(None)
        )
        assert error == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_reports_and_indices(kernel: ctypes.CDLL, dtype: torch.dtype) -> None:
    cost = torch.rand(4, 6, 3).to(dtype)
    cost[0, 4, 1] = torch.nan
    cost[1, :, 2] = torch.inf
    stream = SimpleNamespace(cuda_stream=None)
    with (
        mock.patch("detr_fast.ops._native.module", return_value=HostModule(kernel)),
        mock.patch("torch.cuda.current_stream", return_value=stream),
    ):
        report = report_on_cuda(cost, [3, 3, 2, 0])
        queries, _ = _on_cuda(widened(cost), [3, 3, 2, 0], dual_gap=None)
    assert torch.equal(queries, report.query_of_target)
    assert report.outcome.tolist() == [INVALID, INFEASIBLE, SOLVED, SOLVED]
    assert report.dual_gap[:2].tolist() == [np.inf, np.inf]
    assert (report.dual_gap[2:].abs() <= 1e-12).all()
    np.testing.assert_array_equal(queries[2:], by_scipy(cost[2:].double().numpy(), [2, 0]))
