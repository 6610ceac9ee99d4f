"""csrc/core/auction.h by a warp, run on the host with its lanes in random order, against SciPy."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

ROOT = Path(__file__).parents[2]
FLAGS = ("-O1", "-D__CUDACC__", "-shared", "-fPIC")
SOURCES = ["tests/cpp/simt/auction.cpp", "tests/cpp/simt/simt.cpp"]
SOLVED, INFEASIBLE, INVALID = 0, 1, 2


@pytest.fixture(scope="session")
def kernel(compile_cpp: Callable[..., Path]) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_cpp("simt_auction.so", SOURCES, *FLAGS, f"-I{ROOT}/tests/cpp/simt")))


def solve(kernel: ctypes.CDLL, cost: np.ndarray) -> tuple[np.ndarray, int, float]:
    """Column of each row of [rows, columns] costs, the outcome and the gap."""
    kernel.simt_set_seed(np.random.randint(2**31))
    cost = np.ascontiguousarray(cost, dtype=np.float64)
    column_of_row = np.full(cost.shape[0], -9, dtype=np.int32)
    outcome, gap = ctypes.c_int32(-9), ctypes.c_double(-9)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (cost, column_of_row)]
    kernel.simt_auction(pointers[0], *cost.shape, pointers[1], ctypes.byref(outcome), ctypes.byref(gap))
    return column_of_row, outcome.value, gap.value


KINDS = {
    "ties": lambda shape: np.random.randint(0, 3, shape),
    "integers": lambda shape: np.random.randint(-50, 50, shape),
    "wanted by all": lambda shape: np.random.randint(0, 40, shape[1]) + np.random.randint(0, 4, shape),
    "forbidden pairs": lambda shape: np.where(
        np.eye(*shape) + (np.random.rand(*shape) < 0.6), np.random.randint(0, 9, shape), np.inf
    ),
}


def is_right(kernel: ctypes.CDLL, cost: np.ndarray) -> bool:
    columns, outcome, gap = solve(kernel, cost)
    rows = np.arange(len(columns))
    return (
        outcome == SOLVED
        and len(set(columns)) == len(columns)
        and bool(((columns >= 0) & (columns < cost.shape[1])).all())
        and cost[rows, columns].sum() == cost[linear_sum_assignment(cost)].sum()
        and 0 <= gap < 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_integer_costs_are_solved_exactly(kernel: ctypes.CDLL, kind: str) -> None:
    for shape in [(1, 1), (1, 5), (5, 5), (20, 33), (7, 64), (31, 32)]:
        assert is_right(kernel, KINDS[kind](shape)), shape


def test_broken_problems_are_told(kernel: ctypes.CDLL) -> None:
    cost = np.random.rand(4, 40)
    cost[1, 35] = np.nan
    assert solve(kernel, cost)[1] == INVALID
    cost[1] = np.inf
    assert solve(kernel, cost)[1] == INFEASIBLE


def solve_in_a_process(kernel: ctypes.CDLL, *barrier: str | int) -> int:
    """Of its own, because a solver that races may write anywhere, or go on for ever."""
    command = [sys.executable, __file__, kernel._name, *map(str, barrier)]
    return subprocess.run(command, timeout=120, check=False).returncode


# Those with a comment on their line are for the device alone: what comes before them lets lanes meet here, too.
BARRIERS = [
    (source, number)
    for source in ("auction.h", "auction_start.h")
    for number, line in enumerate((ROOT / "csrc/core" / source).read_text().splitlines(), start=1)
    if line.strip() == "team.sync();"
]


def test_nothing_goes_wrong_with_all_barriers(kernel: ctypes.CDLL) -> None:
    assert solve_in_a_process(kernel, "", 0) == 0


@pytest.mark.parametrize(("source", "line"), BARRIERS)
def test_a_missing_barrier_is_caught(kernel: ctypes.CDLL, source: str, line: int) -> None:
    assert solve_in_a_process(kernel, source, line) != 0, f"nothing went wrong without barrier {line} of {source}"


def main() -> int:
    resource.setrlimit(resource.RLIMIT_CPU, (6, 6))  # seconds; without a race it takes one
    kernel = ctypes.CDLL(sys.argv[1])
    missing_file = sys.argv[2].encode()  # held on to: the library keeps its address
    kernel.simt_leave_out_barrier(missing_file, int(sys.argv[3]))
    shapes = [(6, 40), (12, 33), (20, 20)]
    for round_ in range(24):
        cost = KINDS[list(KINDS)[round_ % len(KINDS)]](shapes[round_ % len(shapes)])
        if not is_right(kernel, cost):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
