"""The assignment solvers of other packages, each called in the way its documentation recommends for speed.

A solver takes float32 or float64 matrices [T, Q] of which none has more rows than columns, and gives its own kind of
result; ``as_matching`` makes them comparable. No total cost is asked for where a package lets one choose.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np

Matrix = np.ndarray
# Takes the problems of a batch [P, T, Q], zeros behind each one's own rows, and the numbers of rows.
SolveBatch = Callable[[Matrix, Sequence[int]], Sequence[Any]]

NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Peer:
    """A solver of another package.

    Attributes:
        name: as it stands in results.
        package: what to install.
        module: what to import.
        one: from the module, the call for one matrix.
        batch: from the module, the call for a batch of equal sizes, where there is one that is no loop in Python.
        ragged: whether that call takes numbers of rows too.
    """

    name: str
    package: str
    module: str
    one: Callable[[ModuleType], Callable[[Matrix], Any]]
    batch: Callable[[ModuleType], SolveBatch] | None = None
    ragged: bool = False

    def why_not(self) -> str | None:
        """The reason why it cannot run here, or None."""
        try:
            metadata.version(self.package)
            self.one(importlib.import_module(self.module))
        except metadata.PackageNotFoundError:
            return f"{self.package} is not installed: pip install -e '.[bench]' installs it where there is a wheel"
        except (ImportError, AttributeError) as error:
            return f"{self.package} does not work here: {error}"
        return None

    def solve_one(self) -> Callable[[Matrix], Any]:
        """The call for one matrix."""
        return self.one(importlib.import_module(self.module))

    def solve_batch(self, equal_sizes: bool) -> SolveBatch:
        """The quickest way through a batch: where sizes differ, a loop is quicker than to solve the padding too."""
        if self.batch is not None and (equal_sizes or self.ragged):
            return self.batch(importlib.import_module(self.module))
        one = self.solve_one()
        return lambda costs, counts: [one(c[:t]) if t else NOTHING for c, t in zip(costs, counts, strict=True)]


def rectangular(solve: Callable[..., Any]) -> Callable[..., Any]:
    """Of packages whose solvers must be told that a matrix may be rectangular, and not to sum up the cost."""
    return lambda costs, *_: solve(costs, extend_cost=True, return_cost=False)


def aligned(solve: Callable[..., Any]) -> SolveBatch:
    """A batch call that gives all rows and then all columns."""
    return lambda costs, _: list(zip(*solve(costs, extend_cost=True, return_cost=False), strict=True))


def torch_linear_assignment_one(module: ModuleType) -> Callable[[Matrix], Any]:
    """It takes tensors: on the CPU it is a loop over SciPy, and CUDA is where it is meant to run."""
    import torch

    return lambda cost: module.batch_linear_assignment(torch.from_numpy(cost)[None])[0].numpy()


def torch_linear_assignment_batch(module: ModuleType) -> SolveBatch:
    import torch

    return lambda costs, _: module.batch_linear_assignment(torch.from_numpy(costs)).numpy()


def lapx_only(name: str) -> Callable[[ModuleType], Callable[[Matrix], Any]]:
    """lap and lapx are both imported as ``lap``; the one installed last is there."""
    return lambda module: rectangular(getattr(module, name))


def lap_only(module: ModuleType) -> Callable[[Matrix], Any]:
    if hasattr(module, "lapjvx"):
        raise ImportError("lapx is installed in its place, under the same name")
    return lambda cost: module.lapjv(cost, extend_cost=True, return_cost=False)[0]


PEERS = (
    Peer("scipy", "scipy", "scipy.optimize", lambda m: m.linear_sum_assignment),
    Peer("lap", "lap", "lap", lap_only),
    *(
        Peer(f"lapx {name}", "lapx", "lap", lapx_only(name), lambda m, name=name: aligned(getattr(m, f"{name}_batch")))
        for name in ("lapjvx", "lapjvr", "lapjvh")
    ),
    Peer("lapx lapjvs", "lapx", "lap", lambda m: partial(m.lapjvs, return_cost=False, jvx_like=True)),
    Peer("lapcpp", "lapcpp", "lapcpp", lambda m: rectangular(m.lapjv), lambda m: aligned(m.lapjv_batch)),
    Peer("laprust", "laprust", "laprust", lambda m: rectangular(m.lapjv), lambda m: aligned(m.lapjv_batch)),
    Peer("fastlap", "fastlap", "fastlap", lambda m: m.linear_sum_assignment),
    Peer(
        "py-lap-solver scipy",
        "py-lap-solver",
        "py_lap_solver.solvers",
        lambda m: m.Solvers.BatchedScipySequential.solve_single,
        lambda m: lambda costs, counts: m.Solvers.BatchedScipyOMP.batch_solve(costs, num_valid=np.asarray(counts)),
        ragged=True,
    ),
    Peer(
        "py-lap-solver 1015",
        "py-lap-solver",
        "py_lap_solver.solvers",
        lambda m: m.Solvers.Lap1015SequentialNoEps.solve_single,
    ),
    Peer(
        "torch-linear-assignment",
        "torch-linear-assignment",
        "torch_linear_assignment",
        torch_linear_assignment_one,
        torch_linear_assignment_batch,
    ),
)


def as_matching(result: Any, count: int) -> Matrix:
    """One problem's result, rows and columns or the column of each row, as the column of each of ``count`` rows."""
    if isinstance(result, np.ndarray):
        return result[:count]
    rows, columns = result
    matching = np.full(count, -1)
    matching[rows] = columns
    return matching
