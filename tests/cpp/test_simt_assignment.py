"""csrc/cuda/assignment.cu, run on the host with its lanes in random order, against SciPy."""

from __future__ import annotations

import ctypes
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

ROOT = Path(__file__).parents[2]
FLAGS = ("-O1", "-D__CUDACC__", "-shared", "-fPIC")
SOURCES = ["tests/cpp/simt/assignment.cpp", "tests/cpp/simt/simt.cpp"]
SOLVED, INFEASIBLE, INVALID = 0, 1, 2


def build(compile_cpp: Callable[..., Path], name: str, root: Path = ROOT) -> Path:
    return compile_cpp(name, SOURCES, *FLAGS, f"-I{root}/tests/cpp/simt", f"-I{root}/csrc/cuda", root=root)


@pytest.fixture(scope="session")
def kernel(compile_cpp: Callable[..., Path]) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(compile_cpp, "simt_assignment.so")))


def launch(
    kernel: ctypes.CDLL, cost: np.ndarray, num_targets: list[int], shared_limit: int = 227 * 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Runs the launcher on [P, Q, T] costs; returns the query of each target [P, T] and the outcomes [P]."""
    three = ctypes.c_int64 * 3
    sizes, strides = three(*cost.shape), three(*(s // cost.itemsize for s in cost.strides))
    counts = (ctypes.c_int64 * len(num_targets))(*num_targets)
    is_double = cost.dtype == np.float64
    kernel.simt_set_shared_limit(ctypes.c_size_t(shared_limit))
    kernel.simt_set_seed(np.random.randint(2**31))
    kernel.detr_fast_assignment_cuda_workspace.restype = ctypes.c_int64
    workspace_bytes = kernel.detr_fast_assignment_cuda_workspace(is_double, sizes, strides, counts, 0)
    workspace = np.full(workspace_bytes + 16, 0xFF, dtype=np.uint8)  # a canary after the end
    query_of_target = np.full((cost.shape[0], cost.shape[2]), -9, dtype=np.int64)
    outcome = np.full(cost.shape[0], -9, dtype=np.int32)
    gap = np.full(cost.shape[0], -9.0)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (cost, query_of_target, outcome, gap, workspace)]
    error = kernel.detr_fast_assignment_cuda(
        pointers[0], is_double, sizes, strides, counts, *pointers[1:], 0, ctypes.c_void_p(None)
    )
    assert error == 0
    assert (workspace[workspace_bytes:] == 0xFF).all(), "the kernel wrote behind its workspace"
    assert (gap[outcome == SOLVED] >= 0).all()
    assert (gap[outcome == SOLVED] <= 1e-12).all(), "shortest paths are exact but for rounding"
    assert (gap[outcome != SOLVED] == np.inf).all()
    return query_of_target, outcome


def by_scipy(cost: np.ndarray, num_targets: list[int]) -> np.ndarray:
    query_of_target = np.full((cost.shape[0], cost.shape[2]), -1, dtype=np.int64)
    for problem, count in enumerate(num_targets):
        queries, targets = linear_sum_assignment(cost[problem, :, :count])
        query_of_target[problem, targets] = queries
    return query_of_target


KINDS = {
    "uniform": lambda shape: np.random.rand(*shape),
    "ties": lambda shape: np.random.randint(0, 3, shape).astype(float),
    "untrained": lambda shape: np.random.rand(shape[0], shape[1], 1) + 0.01 * np.random.rand(*shape),
    "duplicated targets": lambda shape: np.random.rand(*shape)[:, :, np.random.randint(0, shape[2], shape[2])],
}
# What is in shared memory: state and tile; the state; nothing.
PLACEMENTS = {"all shared": 227 * 1024, "state shared": 6 * 1024, "workspace": 64}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_scipy(kernel: ctypes.CDLL, kind: str, placement: str) -> None:
    for queries, most in [(1, 1), (5, 9), (31, 31), (33, 8), (40, 45), (100, 20)]:
        num_targets = [most, 0, np.random.randint(0, most + 1), max(0, most - 1)]
        cost = KINDS[kind]((4, queries, most)).astype(np.random.choice([np.float32, np.float64]))
        if np.random.rand() < 0.5:  # the solver's own layout, which is read in place
            cost = np.ascontiguousarray(cost.transpose(0, 2, 1)).transpose(0, 2, 1)
        found, outcome = launch(kernel, cost, num_targets, PLACEMENTS[placement])
        assert (outcome == SOLVED).all()
        np.testing.assert_array_equal(found, by_scipy(cost, num_targets))


def test_a_batch_of_several_launches(kernel: ctypes.CDLL) -> None:
    cost = np.random.rand(2000, 3, 2).astype(np.float32)
    num_targets = np.random.randint(0, 3, 2000).tolist()
    found, _ = launch(kernel, cost, num_targets)
    np.testing.assert_array_equal(found, by_scipy(cost, num_targets))


def test_broken_problems_are_marked_and_leave_the_others_alone(kernel: ctypes.CDLL) -> None:
    cost = np.random.rand(4, 6, 3)
    cost[0, 4, 1] = np.nan
    cost[1, :, 2] = np.inf
    cost[2, 0, 0] = -np.inf
    found, outcome = launch(kernel, cost, [3, 3, 3, 3])
    assert outcome.tolist() == [INVALID, INFEASIBLE, INVALID, SOLVED]
    assert (found[:3] == -1).all()
    np.testing.assert_array_equal(found[3:], by_scipy(cost[3:], [3]))


def solve_in_a_process(library: Path) -> int:
    """Of its own, because a solver that races may write anywhere, or go on for ever."""
    return subprocess.run([sys.executable, __file__, str(library)], timeout=120, check=False).returncode


def test_nothing_goes_wrong_with_all_barriers(compile_cpp: Callable[..., Path]) -> None:
    assert solve_in_a_process(build(compile_cpp, "with_all_barriers.so")) == 0


BARRIER = re.compile(r"^ *team\.sync\(\);\n", re.MULTILINE)
BARRIERS = [
    (source, index)
    for source in ("csrc/core/lsap.h", "csrc/cuda/assignment.cu")
    for index in range(len(BARRIER.findall((ROOT / source).read_text())))
]


@pytest.mark.parametrize(("source", "index"), BARRIERS)
def test_a_missing_barrier_is_caught(compile_cpp: Callable[..., Path], tmp_path: Path, source: str, index: int) -> None:
    for folder in ("csrc", "tests/cpp/simt"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    text = (ROOT / source).read_text()
    site = list(BARRIER.finditer(text))[index]
    (tmp_path / source).write_text(text[: site.start()] + text[site.end() :])
    library = build(compile_cpp, f"without_barrier_{Path(source).stem}_{index}.so", tmp_path)
    assert solve_in_a_process(library) != 0, f"nothing went wrong without barrier {index} of {source}"


def main() -> int:
    resource.setrlimit(resource.RLIMIT_CPU, (8, 8))  # seconds; without a race it takes two
    kernel = ctypes.CDLL(sys.argv[1])
    for round_ in range(40):
        cost = KINDS[list(KINDS)[round_ % len(KINDS)]]((2, 40, 12))
        found, _ = launch(kernel, cost, [12, 9], PLACEMENTS["all shared" if round_ % 3 else "workspace"])
        if not np.array_equal(found, by_scipy(cost, [12, 9])):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
