"""The public ops, their checks, and their registration with torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.assignment.native import (
    assignment_native,
    quick_assignment,
    report_native,
    why_no_auction,
    why_not,
)
from detr_fast.ops.assignment.reference import assignment_reference, report_reference
from detr_fast.ops.assignment.report import AssignmentReport, raise_unsolved

Method = Literal["shortest_path", "auction"]


def _example(device: torch.device) -> tuple[Tensor, ...]:
    return (torch.empty(1, 1, 1, device=device),)


OP = Op(
    name="assignment",
    implementations=(
        Implementation("native", assignment_native, why_not),
        Implementation("reference", assignment_reference, always_runs),
    ),
    example=_example,
)
REPORT = Op(
    name="solve_assignment",
    implementations=(
        Implementation("native", partial(report_native, method="shortest_path"), why_not),
        Implementation("reference", partial(report_reference, method="shortest_path"), always_runs),
    ),
    example=_example,
)
AUCTION = Op(
    name="auction",
    implementations=(
        Implementation("native", partial(report_native, method="auction"), why_no_auction),
        Implementation("reference", partial(report_reference, method="auction"), always_runs),
    ),
    example=_example,
)
REPORTS = {"shortest_path": REPORT, "auction": AUCTION}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def assignment(
    cost: Tensor, num_targets: Sequence[int], *, method: Method = "shortest_path", backend: str | None = None
) -> Tensor:
    """Give every target its own query at the lowest total cost, for P problems at once.

    Column ``t >= num_targets[p]`` of problem ``p`` is padding: it is not read. A problem with more targets than queries
    leaves some targets without one.

    ``method="shortest_path"``: the total is optimal in float64. Where several assignments are, the one returned is that
    of SciPy's ``linear_sum_assignment`` on the ``[Q, T]`` matrix of the problem.

    ``method="auction"``: for large dense squares on the CPU; see ``solve_assignment`` for what it guarantees and when
    it is faster. Where several assignments are optimal, it returns any of them.

    Args:
        cost: [P, Q, T] float32, float64, bfloat16 or float16, with any strides; +inf forbids a pair.
        num_targets: P counts in [0, T], on the host.
        method: "shortest_path" or "auction".
        backend: "reference" or "native"; None takes the fastest that can run here. The native auction runs on the CPU
            only; on CUDA the reference solves it on the host.

    Returns:
        [P, T] int64 on ``cost.device``: the query of each target, -1 where there is none.

    Raises:
        ValueError: shape, dtype, counts or method are not as above. On the CPU and with the reference also where a
            cost is NaN or -inf (by auction: or larger than 1e300), or where +inf leaves no way to match, as SciPy does;
            the native code on CUDA, which nothing may wait for, then returns -1 for all targets of the problem.
            Other problems of the batch do not feel it. ``solve_assignment`` tells which, and never raises for values.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. On CUDA it does not wait for the device, but for the auction; the counts are part of a captured
    graph.
    """
    if backend is None and method == "shortest_path" and not torch.compiler.is_compiling():
        query_of_target = quick_assignment(cost, num_targets)
        if query_of_target is not None:
            return query_of_target
    _check(cost, num_targets, method)
    if goes_through_dispatcher(cost):
        return torch.ops.detr_fast.assignment(cost, num_targets, method, backend)
    return _run(cost, num_targets, method, backend)


def solve_assignment(
    cost: Tensor, num_targets: Sequence[int], *, method: Method = "shortest_path", backend: str | None = None
) -> AssignmentReport:
    """``assignment`` that says what it achieved: which problems are solved, and how far from the optimum at most.

    It never raises for what the costs are: a NaN or -inf makes a problem INVALID and leaves the others alone, and a
    problem that +inf makes impossible is INFEASIBLE (``AssignmentOutcome``). Nothing is read back, so on CUDA nothing
    waits (but for the auction, which runs on the host), and the reports of a captured graph change with its inputs.

    ``method="shortest_path"`` is exact; its ``dual_gap`` is 0 but for rounding in float64 and a certificate of that.

    ``method="auction"`` (forward and reverse with epsilon scaling; Bertsekas and Castanon, "A forward/reverse auction
    algorithm for asymmetric assignment problems", Computational Optimization and Applications 1, 1992): let all finite
    costs be multiples of q, a power of two (q = 1 for integers), n the smaller of Q and the number of targets, and c
    the largest size of a cost. It ends with an epsilon of at most q / n, as if integers were scaled by n + 1, and
    ``dual_gap <= n * epsilon``.

    - Where ``dual_gap < q``, the total is the optimum, exactly. So it is with ``c <= 2**45 * q / n``: with a thousand
      targets those are integers up to 1e10, and multiples of 2**-24, such as ``torch.rand`` gives, up to 2000.
    - Otherwise epsilon is at most ``2**-45 * c``, and the total at most ``n * 2**-45 * c`` above the optimum.
    - Prices beyond ``32 * c``, which forbidden pairs can make necessary, make epsilon larger: at most 2**-50 of them.

    It is not the default: it does not choose as SciPy does at ties, and is faster only on large squares whose rows want
    the same columns. Milliseconds of shortest paths and of the auction, float32 on one thread with AVX-512 (``pytest
    benchmarks/bench_auction.py --benchmark``, benchmarks/results/xeon-2-cores-auction.json), squares of 500, 1000,
    2000:

    - row + column + noise: 4.2 and 2.9, 17 and 10, 176 and 51; row * column, of 500 and 1000: 38 and 6.6, 232 and 29;
    - distances of points in a plane: 3.0 and 4.7, 15 and 14, 76 and 77;
    - uniform: 1.6 and 3.5, 5.9 and 10, 35 and 46; integers below a million: 1.4 and 2.5, 5.4 and 7.9, 32 and 38;
    - with ties everywhere (integers from 1 to 100): 1.2 and 4.2, 3.6 and 14, 21 and 54.

    Rectangles take it longer: 1000x900 uniform 1.9 and 28, row + column + noise 17 and 25; 2000x300 0.1 and 4.4.

    Args, errors of metadata and the rest are those of ``assignment``.

    Returns:
        ``AssignmentReport(query_of_target [P, T], outcome [P], dual_gap [P])`` on ``cost.device``.
    """
    _check(cost, num_targets, method)
    if goes_through_dispatcher(cost):
        return AssignmentReport(*torch.ops.detr_fast.solve_assignment(cost, num_targets, method, backend))
    return REPORTS[method].choose(backend, cost).run(cost, num_targets)


def _check(cost: Tensor, num_targets: Sequence[int], method: str) -> None:
    if cost.dim() != 3:
        raise ValueError(f"cost must be [P, Q, T], got {tuple(cost.shape)}")
    if cost.dtype not in DTYPES:
        raise ValueError(f"cost must be float32, float64, bfloat16 or float16, got {cost.dtype}")
    problems, _, targets = cost.shape
    if len(num_targets) != problems:
        raise ValueError(f"num_targets must have one count for each of the {problems} problems, got {len(num_targets)}")
    for problem, count in enumerate(num_targets):
        if not 0 <= count <= targets:
            raise ValueError(f"num_targets[{problem}] must be in [0, {targets}], got {count}")
    if method not in REPORTS:
        raise ValueError(f"method must be one of {', '.join(map(repr, REPORTS))}, got {method!r}")


def _run(cost: Tensor, num_targets: Sequence[int], method: str, backend: str | None) -> Tensor:
    if method == "shortest_path":
        return OP.choose(backend, cost).run(cost, num_targets)
    report = AUCTION.choose(backend, cost).run(cost, num_targets)
    # The auction has run on the host, even where its costs lie on a device.
    return raise_unsolved(report, cost, num_targets)


# The counts are SymInt, so that a graph that torch compiles holds for other counts too.
_ARGUMENTS = "(Tensor cost, SymInt[] num_targets, str method='shortest_path', str? backend=None)"
torch.library.define("detr_fast::assignment", f"{_ARGUMENTS} -> Tensor")
torch.library.define("detr_fast::solve_assignment", f"{_ARGUMENTS} -> (Tensor, Tensor, Tensor)")


@torch.library.impl("detr_fast::assignment", "CompositeExplicitAutograd")
def _assignment(
    cost: Tensor, num_targets: Sequence[int], method: str = "shortest_path", backend: str | None = None
) -> Tensor:
    return _run(cost, num_targets, method, backend)


@torch.library.impl("detr_fast::solve_assignment", "CompositeExplicitAutograd")
def _solve_assignment(
    cost: Tensor, num_targets: Sequence[int], method: str = "shortest_path", backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return REPORTS[method].choose(backend, cost).run(cost, num_targets)


@torch.library.register_fake("detr_fast::assignment")
def _assignment_fake(
    cost: Tensor, num_targets: Sequence[int], method: str = "shortest_path", backend: str | None = None
) -> Tensor:
    return cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int64)


@torch.library.register_fake("detr_fast::solve_assignment")
def _solve_assignment_fake(
    cost: Tensor, num_targets: Sequence[int], method: str = "shortest_path", backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    problems = cost.shape[0]
    return (
        cost.new_empty((problems, cost.shape[2]), dtype=torch.int64),
        cost.new_empty(problems, dtype=torch.int32),
        cost.new_empty(problems, dtype=torch.float64),
    )
