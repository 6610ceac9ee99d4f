"""Holds the assignment to SciPy's over as many random problems as one likes, and proves large ones optimal.

    python -m benchmarks.exactness --problems 100000 --seed 1

Problems come in ragged batches of one kind, one number of queries and one dtype; behind each problem's own targets
stands NaN. SciPy solves each in float64. Where the indices are others than SciPy's, the totals are compared exactly
(``math.fsum``). Problems of a thousand queries and more are also proven optimal, by prices found from the matching
alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks import costs, machine
from detr_fast.ops import assignment

BATCH = 32
# One batch in this many has up to 2000 queries, and fewer problems; the others have at most 130.
LARGE_BATCHES = 25
Solver = Callable[[Tensor, list[int]], Tensor]
Kind = Callable[[int, int, torch.Generator], Tensor]


def integers(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """Small integers, so that there are ties everywhere."""
    largest = int(torch.randint(1, 50, (), generator=generator))
    return torch.randint(0, largest + 1, (targets, queries), generator=generator).float()


def same_targets(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """About a third of the targets are duplicates of others."""
    cost = costs.trained(targets, queries, generator)
    return cost[torch.where(torch.rand(targets, generator=generator) < 1 / 3, 0, torch.arange(targets))]


def same_queries(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """Most queries are duplicates of others."""
    cost = costs.trained(targets, queries, generator)
    return cost[:, torch.randint(0, queries, (queries,), generator=generator)]


def decimals(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """Rounded to tenths in float64: what ties in decimals is no tie in binary sums, or is one only in some order."""
    return (costs.uniform(targets, queries, generator).double() * 20).round() / 10


KINDS: tuple[Kind, ...] = (
    *(costs.uniform, costs.trained, costs.untrained, costs.alike),
    *(integers, same_targets, same_queries, decimals),
)


@dataclass
class Tally:
    """What was found for one kind of problem.

    Attributes:
        problems: how many were solved.
        costs: how many costs they had altogether.
        same_indices: how many have SciPy's indices.
        same_total: how many of the others have exactly SciPy's total.
        lower_total: how many of the others have a lower one.
        worst_excess: by how much a total is above SciPy's at most, relative to the largest cost.
        proven: how many were proven optimal by prices.
        worst_gap: the largest difference of total and proven lower bound, relative to the largest cost.
    """

    problems: int = 0
    costs: int = 0
    same_indices: int = 0
    same_total: int = 0
    lower_total: int = 0
    worst_excess: float = 0.0
    proven: int = 0
    worst_gap: float = 0.0

    def add(self, cost: np.ndarray, found: np.ndarray, expected: np.ndarray) -> None:
        """One problem [Q, T] float64 and the query of each target, -1 for none, by us and by SciPy."""
        self.problems += 1
        self.costs += cost.size
        if np.array_equal(found, expected):
            self.same_indices += 1
            return
        excess = total(cost, found) - total(cost, expected)
        self.same_total += excess == 0
        self.lower_total += excess < 0
        self.worst_excess = max(self.worst_excess, excess / np.abs(cost).max())


@dataclass
class Report:
    """The tallies of a run, by kind."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    most_queries: int = 0
    most_targets: int = 0


def run(problems: int, seed: int, solve: Solver = assignment, large_batches: int = LARGE_BATCHES) -> Report:
    """Solve about that many problems with ``solve`` and with SciPy, and compare."""
    generator = torch.Generator().manual_seed(seed)
    report = Report({kind.__name__: Tally() for kind in KINDS})
    solved = batches = 0
    while solved < problems:
        kind = KINDS[batches % len(KINDS)]
        is_large = batches // len(KINDS) % large_batches == large_batches - 1
        queries, counts = draw_sizes(is_large, generator)
        compare(report, kind, queries, counts, solve, generator, certify=is_large)
        solved += len(counts)
        batches += 1
    return report


def draw_sizes(is_large: bool, generator: torch.Generator) -> tuple[int, list[int]]:
    """The queries and the targets of a batch's problems: none, one, as many as queries, more, or any number."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    if is_large:
        queries = draw(1000, 2000)
        return queries, [draw(0, 300), queries] if draw(0, 9) == 0 else [draw(0, 300), draw(0, 300)]
    queries = draw(1, 130)
    choices = (lambda: 0, lambda: 1, lambda: queries, lambda: queries + draw(1, 30), *5 * (lambda: draw(0, queries),))
    return queries, [choices[draw(0, len(choices) - 1)]() for _ in range(BATCH)]


def compare(
    report: Report,
    kind: Kind,
    queries: int,
    counts: Sequence[int],
    solve: Solver,
    generator: torch.Generator,
    certify: bool,
) -> None:
    """Solve a batch and add every problem of it to the tally of its kind."""
    wide = kind is decimals or bool(torch.rand((), generator=generator) < 0.25)
    targets_first = bool(torch.rand((), generator=generator) < 0.5)
    cost = torch.full((len(counts), queries, max(counts)), torch.nan, dtype=torch.float64 if wide else torch.float32)
    if targets_first:
        cost = cost.transpose(1, 2).contiguous().transpose(1, 2)
    for problem, count in zip(cost, counts, strict=True):
        drawn = kind(min(count, queries), max(count, queries), generator)  # no kind has more targets than queries
        problem[:, :count] = drawn.T if count <= queries else drawn
    tally = report.tallies[kind.__name__]
    for problem, count, found in zip(cost.double().numpy(), counts, solve(cost, list(counts)).numpy(), strict=True):
        matrix = problem[:, :count]
        expected = np.full(count, -1)
        rows, columns = linear_sum_assignment(matrix)
        expected[columns] = rows
        tally.add(matrix, found[:count], expected)
        if certify and 0 < count <= queries:
            tally.proven += 1
            tally.worst_gap = max(tally.worst_gap, duality_gap(matrix.T, found[:count]) / np.abs(matrix).max())
    report.most_queries = max(report.most_queries, queries)
    report.most_targets = max(report.most_targets, *counts)


def total(cost: np.ndarray, query_of_target: np.ndarray) -> float:
    """The exact sum of the matched costs of [Q, T], rounded once."""
    (targets,) = np.nonzero(query_of_target >= 0)
    return math.fsum(cost[query_of_target[targets], targets])


def duality_gap(cost: np.ndarray, matching: np.ndarray) -> float:
    """How far a matching's total may be above the lowest, by prices that follow from the matching (Bellman and Ford).

    A row's price is what its column costs it less that column's price. Prices of columns fall until no row would pay
    less elsewhere, which ends for an optimal matching only. Whatever the prices, the sum of all rows' cheapest entries
    less prices, plus the lowest prices of as many columns as there are rows, is below every total.

    Args:
        cost: [T, Q] float64, T <= Q.
        matching: [T], a column for each row.
    """
    rows, columns = cost.shape
    price = np.zeros(columns)
    for _ in range(columns):
        row_price = cost[np.arange(rows), matching] - price[matching]
        lower = np.minimum(price, (cost - row_price[:, None]).min(0))
        if np.array_equal(lower, price):
            break
        price = lower
    bound = math.fsum((cost - price).min(1)) + math.fsum(np.sort(price)[:rows])
    return math.fsum(cost[np.arange(rows), matching]) - bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--results", type=Path, help="add the summary to the runs in this JSON file")
    arguments = parser.parse_args()
    start = time.perf_counter()
    report = run(arguments.problems, arguments.seed)
    summary = {
        **machine.describe(),
        "command": f"python -m benchmarks.exactness --problems {arguments.problems} --seed {arguments.seed}",
        "seconds": round(time.perf_counter() - start),
        "most_queries": report.most_queries,
        "most_targets": report.most_targets,
        "kinds": {name: asdict(tally) for name, tally in report.tallies.items()},
    }
    print(json.dumps(summary, indent=1))
    if arguments.results:
        runs = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
        arguments.results.write_text(json.dumps([*runs, summary], indent=1) + "\n")


if __name__ == "__main__":
    main()
