"""The matching's Python half over csrc/cuda/matching.cu on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from ops.matching_cases import Case
from torch import Tensor

from detr_fast.ops.matching.native import _on_cuda
from detr_fast.ops.matching_cost.native import NativeArguments
from detr_fast.ops.matching_cost.types import CostWeights, PaddedTargets

# What is in shared memory: state and costs; the state; nothing but the warps' totals.
PLACEMENTS = {"all shared": 227 * 1024, "state shared": 6 * 1024, "workspace": 192}
CANARY = 16


class Inputs(ctypes.Structure):
    """struct detr_fast_matching_inputs."""

    _fields_ = [
        ("is_double", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("layers", "images", "queries", "classes")),
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("logits", "boxes", "extra")),
        ("logit_strides", ctypes.c_int64 * 2),
        ("box_strides", ctypes.c_int64 * 2),
        ("labels", ctypes.c_void_p),
        ("target_boxes", ctypes.c_void_p),
        ("num_targets", ctypes.POINTER(ctypes.c_int64)),
    ]


class Weights(ctypes.Structure):
    """struct detr_fast_cost_weights."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("cost_class", "cost_bbox", "cost_giou")),
        ("focal", ctypes.c_bool),
        *((name, ctypes.c_double) for name in ("alpha", "gamma")),
    ]


class Padded(ctypes.Structure):
    """struct detr_fast_padded_targets."""

    _fields_ = [("offsets", ctypes.c_void_p), ("room", ctypes.c_int64)]


class MatchingInputs:
    """As csrc/bindings.cpp has it."""

    def __init__(self, is_double: bool, sizes: Sequence[int], *rest: Any) -> None:
        logits, boxes, extra, logit_strides, box_strides, labels, target_boxes, num_targets, weights, focal = rest
        lists = [(ctypes.c_void_p * len(a))(*a) if a else None for a in (logits, boxes, extra)]
        strides = [(ctypes.c_int64 * 2)(*s) for s in (logit_strides, box_strides)]
        counts = (ctypes.c_int64 * len(num_targets))(*num_targets)
        pointer = ctypes.POINTER(ctypes.c_void_p)
        lists = [ctypes.cast(a, pointer) for a in lists]
        counts = ctypes.cast(counts, ctypes.POINTER(ctypes.c_int64))
        self.inputs = Inputs(is_double, *sizes, *lists, *strides, labels, target_boxes, counts)
        self.weights = Weights(*weights[:3], focal, *weights[3:])


class HostModule:
    """Stands for detr_fast._C; checks that nothing is written behind the workspace."""

    MatchingInputs = MatchingInputs

    def __init__(self, library: Path | str) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.detr_fast_matching_cuda_workspace.restype = ctypes.c_int64
        self.workspace_bytes = 0

    def matching_cuda_workspace(self, m: MatchingInputs, device: int | None) -> int:
        self.workspace_bytes = self.library.detr_fast_matching_cuda_workspace(ctypes.byref(m.inputs), 0)
        assert self.workspace_bytes >= 0
        return self.workspace_bytes + CANARY

    def matching_cuda(
        self, m: MatchingInputs, dtypes: Sequence[int], padded: tuple[int, int], *addresses: int | None
    ) -> None:
        query_of_target, nonfinite, workspace, _, stream = addresses
        ctypes.memset(workspace, 0xFF, self.workspace_bytes + CANARY)
        codes = (ctypes.c_int32 * 4)(*dtypes)
        results = [ctypes.c_void_p(a) for a in (query_of_target, nonfinite, workspace)]
        structs = [ctypes.byref(s) for s in (m.inputs, codes, m.weights, Padded(*padded))]
        assert self.library.detr_fast_matching_cuda(*structs, *results, 0, ctypes.c_void_p(stream)) == 0
        behind = ctypes.string_at(workspace + self.workspace_bytes, CANARY)
        assert behind == b"\xff" * CANARY, "the kernel wrote behind its workspace"


def run_on_host(
    module: HostModule,
    case: Case,
    weights: CostWeights,
    extra: Sequence[Tensor] | None = None,
    shared_limit: int = PLACEMENTS["all shared"],
) -> tuple[Tensor, Tensor]:
    """What ``matching`` does with tensors on CUDA."""
    module.library.simt_set_shared_limit(ctypes.c_size_t(shared_limit))
    module.library.simt_set_seed(np.random.randint(2**31))
    query_of_target = case.targets.labels.new_full((len(case.logits), len(case.targets.labels)), -9)
    if isinstance(case.targets, PaddedTargets):
        query_of_target.fill_(-1)
    nonfinite = query_of_target.new_full((len(case.logits), len(case.logits[0])), -9)
    stream = SimpleNamespace(cuda_stream=None)
    with (
        mock.patch("detr_fast.ops._native.module", return_value=module),
        mock.patch("torch.cuda.current_stream", return_value=stream),
    ):
        _on_cuda(NativeArguments(*case, weights, extra, for_kernel=True), query_of_target, nonfinite)
    return query_of_target, nonfinite
