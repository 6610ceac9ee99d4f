"""The public op, its checks, and its registration with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.assignment.native import assignment_native, why_not
from detr_fast.ops.assignment.reference import assignment_reference

OP = Op(
    name="assignment",
    implementations=(
        Implementation("native", assignment_native, why_not),
        Implementation("reference", assignment_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, device=device),),
)


def assignment(cost: Tensor, num_targets: Sequence[int], *, backend: str | None = None) -> Tensor:
    """Give every target its own query at the lowest total cost, for P problems at once.

    The total is optimal in float64. Where several assignments are, the one returned is that of SciPy's
    ``linear_sum_assignment`` on the ``[Q, T]`` matrix of the problem. Column ``t >= num_targets[p]`` of problem ``p``
    is padding: it is not read. A problem with more targets than queries leaves some targets without one.

    Args:
        cost: [P, Q, T] float32 or float64, with any strides; +inf forbids a pair.
        num_targets: P counts in [0, T], on the host.
        backend: "reference" or "native"; None takes the fastest that can run here.

    Returns:
        [P, T] int64 on ``cost.device``: the query of each target, -1 where there is none.

    Raises:
        ValueError: shape, dtype or counts are not as above. On the CPU and with the reference also where a cost is
            NaN or -inf, or where +inf leaves no way to match; the native code on CUDA, which nothing may wait for,
            then returns -1 for all targets of the problem.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. On CUDA it does not wait for the device; the counts are part of a captured graph.
    """
    _check(cost, num_targets)
    if goes_through_dispatcher(cost):
        return torch.ops.detr_fast.assignment(cost, num_targets, backend)
    return OP.choose(backend, cost).run(cost, num_targets)


def _check(cost: Tensor, num_targets: Sequence[int]) -> None:
    if cost.dim() != 3:
        raise ValueError(f"cost must be [P, Q, T], got {tuple(cost.shape)}")
    if cost.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"cost must be float32 or float64, got {cost.dtype}")
    problems, _, targets = cost.shape
    if len(num_targets) != problems:
        raise ValueError(f"num_targets must have one count for each of the {problems} problems, got {len(num_targets)}")
    for problem, count in enumerate(num_targets):
        if not 0 <= count <= targets:
            raise ValueError(f"num_targets[{problem}] must be in [0, {targets}], got {count}")


# The counts are SymInt, so that a graph that torch compiles holds for other counts too.
torch.library.define("detr_fast::assignment", "(Tensor cost, SymInt[] num_targets, str? backend=None) -> Tensor")


@torch.library.impl("detr_fast::assignment", "CompositeExplicitAutograd")
def _assignment(cost: Tensor, num_targets: Sequence[int], backend: str | None = None) -> Tensor:
    return OP.choose(backend, cost).run(cost, num_targets)


@torch.library.register_fake("detr_fast::assignment")
def _assignment_fake(cost: Tensor, num_targets: Sequence[int], backend: str | None = None) -> Tensor:
    return cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int64)
