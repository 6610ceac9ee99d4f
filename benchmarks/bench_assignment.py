"""The assignment alone, given the costs, against SciPy and every other solver there is a wheel of.

The costs are float32 and lie as a solver wants them, a target's costs one after another. Batches have 192 problems (32
images, six layers). Each solver of another package is called in its quickest way: where all problems have one size,
its batch call; else a loop, unless its batch call takes the counts. Contestants whose call takes longer than a third
of a second do not take part. The floor is reading the costs once, as torch sums them with all threads.

On a GPU the costs lie there: SciPy gets a copy of them, torch-linear-assignment gets them as they are, and the other
packages do not take part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks import costs, where
from benchmarks.harness import Contest, Contestant
from benchmarks.marks import marked
from benchmarks.peers import PEERS, Peer, as_matching
from benchmarks.shapes import COCO_LARGE
from detr_fast.ops import assignment
from detr_fast.ops.assignment.api import OP

Race = Callable[[str, str, Callable[[], Contest]], None]
OURS = ("native", "reference")
TORCH = "torch-linear-assignment"
LONGEST_CALL = 1 / 3  # seconds


@dataclass(frozen=True)
class Problems:
    """Several problems with one number of queries, and numbers of targets of their own."""

    name: str
    kind: Callable[[int, int, torch.Generator], Tensor]
    queries: int
    counts: tuple[int, ...]

    @property
    def equal_sizes(self) -> bool:
        """Whether all problems have as many targets."""
        return len(set(self.counts)) == 1

    def draw(self) -> Tensor:
        """[P, T, Q] float32, zeros behind each problem's own targets."""
        generator = torch.Generator().manual_seed(0)
        cost = torch.zeros(len(self.counts), max(self.counts), self.queries)
        for problem, count in zip(cost, self.counts, strict=True):
            problem[:count] = self.kind(count, self.queries, generator)
        return cost


def batch(queries: int, targets: int) -> Problems:
    return Problems(f"batch {queries}x{targets}", costs.trained, queries, (targets,) * 192)


def single(queries: int, targets: int, kind: Callable[..., Tensor] = costs.trained) -> Problems:
    return Problems(f"{kind.__name__} {queries}x{targets}", kind, queries, (targets,))


SIZES = ((100, 7), (300, 20), (900, 30), (300, 100), (900, 300))
CASES = (
    *(Problems(f"ragged {q}", costs.trained, q, COCO_LARGE.targets * COCO_LARGE.num_layers) for q in (100, 300)),
    *(batch(*size) for size in SIZES[:4]),
    *(single(*size) for size in SIZES),
    *(single(n, n) for n in (10, 100, 1000, 2000)),
    *(single(n, n, costs.uniform) for n in (10, 100, 1000, 2000)),
    *(single(q, t, kind) for kind in (costs.untrained, costs.alike) for q, t in ((300, 100), (900, 300))),
)


def is_large(problems: Problems) -> bool:
    """Half a million costs or more."""
    return problems.queries * sum(problems.counts) > 500_000


@pytest.mark.parametrize("contestant", [*(peer.name for peer in PEERS), *OURS])
@pytest.mark.parametrize("problems", marked(CASES, is_large))
def test_assignment(race: Race, problems: Problems, contestant: str) -> None:
    race(f"assignment {problems.name}", contestant, lambda: contest(problems))


def contest(problems: Problems) -> Contest:
    """All solvers that are here and quick enough, SciPy first."""
    cost = problems.draw()
    contestants, skipped = peers_on_gpu(problems, cost) if on_gpu() else peers_on_cpu(problems, cost.numpy())
    for backend, reason in OP.reasons(where.device()).items():
        if reason is None:
            contestants.append(Contestant(backend, our_call(backend, problems, cost.to(where.device()))))
        else:
            skipped[backend] = reason
    expected = [linear_sum_assignment(c[:t]) for c, t in zip(cost.numpy(), problems.counts, strict=True)]
    return Contest(
        contestants,
        lambda found: check(found, cost.numpy(), problems.counts, expected),
        str(where.device()),
        floors=[costs_read_once(problems)],
        skipped=skipped,
    )


def on_gpu() -> bool:
    return where.device().type == "cuda"


def peers_on_cpu(problems: Problems, cost: np.ndarray) -> tuple[list[Contestant], dict[str, str]]:
    """The solvers of other packages that are here and quick enough; and the others, with the reason."""
    skipped = {peer.name: reason for peer in PEERS if (reason := peer.why_not()) is not None}
    for peer in PEERS[1:]:
        if peer.name not in skipped and (seconds := seconds_of_all(peer, problems, cost)) > LONGEST_CALL:
            skipped[peer.name] = f"a call takes {seconds:.1f} s"
    return [peer_contestant(peer, problems, cost) for peer in PEERS if peer.name not in skipped], skipped


def peers_on_gpu(problems: Problems, cost: Tensor) -> tuple[list[Contestant], dict[str, str]]:
    """SciPy with a copy to the host, and the one package that has a kernel."""
    on_device, counts = cost.to(where.device()), problems.counts

    def scipy() -> list[Any]:
        return [linear_sum_assignment(c[:t]) for c, t in zip(on_device.cpu().numpy(), counts, strict=True)]

    skipped = {peer.name: "it has no kernel for a GPU" for peer in PEERS[1:]}
    try:
        from torch_linear_assignment import batch_linear_assignment
    except ImportError as error:
        return [Contestant("scipy", scipy)], skipped | {TORCH: f"{TORCH} is not installed: {error}"}
    del skipped[TORCH]
    on_gpu = Contestant(TORCH, lambda: list(batch_linear_assignment(on_device).cpu().numpy()))
    return [Contestant("scipy", scipy), on_gpu], skipped


def peer_contestant(peer: Peer, problems: Problems, cost: np.ndarray) -> Contestant:
    """The solver of another package on these problems; of a single one, its call for one."""
    if len(problems.counts) == 1:
        one, matrix = peer.solve_one(), cost[0]
        return Contestant(peer.name, lambda: [one(matrix)], counts_memory=False)
    solve = peer.solve_batch(problems.equal_sizes)
    return Contestant(peer.name, lambda: solve(cost, problems.counts), counts_memory=False)


def our_call(backend: str, problems: Problems, cost: Tensor) -> Callable[[], Tensor]:
    """As a user calls it, who names no backend; the reference by its name."""
    queries_first, counts = cost.transpose(1, 2), list(problems.counts)  # [P, Q, T]
    if backend == "native":
        return lambda: assignment(queries_first, counts)
    return lambda: assignment(queries_first, counts, backend=backend)


def seconds_of_all(peer: Peer, problems: Problems, cost: np.ndarray) -> float:
    """About how long it takes for the batch, from its time for the problem with most targets."""
    one, largest = peer.solve_one(), max(range(len(cost)), key=lambda p: problems.counts[p])
    start = time.perf_counter()
    one(cost[largest])
    share = sum(problems.counts) / problems.counts[largest]
    return (time.perf_counter() - start) * share


def costs_read_once(problems: Problems) -> Contestant:
    """The sum of as many numbers as there are costs."""
    numbers = torch.rand(problems.queries * sum(problems.counts), device=where.device())
    return Contestant("floor: costs read", lambda: numbers.sum())


def check(
    found: Any, cost: np.ndarray, counts: Sequence[int], expected: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Raise unless every problem is solved; ours, a tensor, with SciPy's indices, the others' at the lowest cost.

    Some solvers work in float32, so that their total may be too high by its rounding.
    """
    for p, (count, (targets, queries)) in enumerate(zip(counts, expected, strict=True)):
        if isinstance(found, Tensor):
            np.testing.assert_array_equal(found[p, :count].cpu().numpy(), queries, err_msg=f"problem {p}")
            continue
        matching = as_matching(found[p], count)
        assert len(set(matching)) == count, f"problem {p}: {len(set(matching))} queries for {count} targets"
        total, lowest = (cost[p, targets, q].astype(np.float64).sum() for q in (matching, queries))
        np.testing.assert_allclose(total, lowest, rtol=1e-5, atol=1e-5, err_msg=f"problem {p}: total cost")
