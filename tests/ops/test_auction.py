"""The assignment by auction: totals against SciPy, brute force and published optima, and the gap that it reports."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from detr_fast.ops import AssignmentOutcome, AssignmentReport, assignment, solve_assignment
from ops.assignment_cases import BACKENDS, KINDS, SHAPES, by_scipy, needs_native, random_cost, total

# The reference works in float64 whatever comes.
ON_DTYPES = [("reference", torch.float32)]
ON_DTYPES += [
    pytest.param("native", dtype, marks=needs_native)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
]

# Rounding in float64 of a sum of a few hundred costs of about 1.
ROUNDING = 1e-12


def check(cost: Tensor, num_targets: list[int], report: AssignmentReport) -> None:
    """Every problem is matched as far as it goes, and its gap tells the truth about SciPy's optimum."""
    optimal = by_scipy(cost, num_targets)
    assert (report.outcome == AssignmentOutcome.SOLVED).all()
    for problem, count in enumerate(num_targets):
        ours, theirs = report.query_of_target[problem], optimal[problem]
        assert int((ours >= 0).sum()) == min(count, cost.shape[1])
        above = total(cost[problem], ours) - total(cost[problem], theirs)
        gap = float(report.dual_gap[problem])
        assert gap >= 0
        assert -ROUNDING <= above <= gap + ROUNDING


def last_epsilon(cost: Tensor, n: int) -> float:
    """The bound of ``solve_assignment``'s docstring."""
    finite = cost[cost.isfinite()].double()
    multiples = [abs(multiple) for multiple in as_integers(finite) if multiple != 0]
    q = Fraction(min((multiple & -multiple for multiple in multiples), default=0), 2**1074)
    return max(float(q / n), 2.0**-45 * float(finite.abs().max()))


def as_integers(numbers: Tensor) -> list[int]:
    """Multiples of the smallest float64 number, 2**-1074."""
    fractions = [value.as_integer_ratio() for value in numbers.flatten().tolist()]
    return [numerator * (2**1074 // denominator) for numerator, denominator in fractions]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), ON_DTYPES)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "crowded"])
def test_totals_are_as_good_as_the_gap_says(shape: str, backend: str, dtype: torch.dtype, kind: str) -> None:
    queries, targets, num_targets = SHAPES[shape]
    cost = random_cost(kind, len(num_targets), queries, targets).to(dtype)
    report = solve_assignment(cost, num_targets, method="auction", backend=backend)
    assert (report.query_of_target.dtype, report.outcome.dtype) == (torch.int64, torch.int32)
    check(cost, num_targets, report)
    for problem, count in enumerate(num_targets):
        n = min(count, queries)
        if n > 0:
            largest = n * last_epsilon(cost[problem, :, :count], n)
            assert float(report.dual_gap[problem]) <= largest + ROUNDING
    assert torch.equal(assignment(cost, num_targets, method="auction", backend=backend), report.query_of_target)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(300, 100), (250, 249), (300, 300), (120, 300)])
def test_large_problems(shape: tuple[int, int], kind: str) -> None:
    cost = random_cost(kind, 1, *shape).float()
    check(cost, [shape[1]], solve_assignment(cost, [shape[1]], method="auction", backend="native"))


@needs_native
def test_many_small_problems() -> None:
    for _ in range(20):
        queries, targets = int(torch.randint(1, 24, ())), int(torch.randint(1, 28, ()))
        for kind in KINDS:
            num_targets = torch.randint(0, targets + 1, (16,)).tolist()
            cost = random_cost(kind, 16, queries, targets).float()
            check(cost, num_targets, solve_assignment(cost, num_targets, method="auction", backend="native"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "targets"), [(5, 3), (4, 4), (3, 5), (6, 1), (1, 4)])
def test_total_is_the_best_of_all_assignments(backend: str, queries: int, targets: int) -> None:
    cost = torch.randint(-9, 10, (queries, targets)).float()
    wide = cost if queries >= targets else cost.T
    rows = itertools.permutations(range(wide.shape[0]), wide.shape[1])
    best = min(sum(wide[i, j].item() for j, i in enumerate(chosen)) for chosen in rows)
    assert total(cost, assignment(cost[None], [targets], method="auction", backend=backend)[0]) == best


@needs_native
@pytest.mark.parametrize("name", ["lap_assign500.npz", "lap_assign600.npz", "lap_assign700.npz"])
def test_published_optima(shared_data: Path, known_answers: dict, name: str) -> None:
    cost = torch.from_numpy(np.load(shared_data / "fixtures" / name)["cost"].astype(np.float32))
    report = solve_assignment(cost[None], [cost.shape[1]], method="auction", backend="native")
    assert total(cost, report.query_of_target[0]) == known_answers["lap"][name]
    assert float(report.dual_gap[0]) < 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(12, 12), (14, 9), (9, 14)])
def test_a_chain_of_forbidden_pairs_that_leaves_one_way(backend: str, shape: tuple[int, int]) -> None:
    """Prices have to climb along the chain, one after another."""
    queries, targets = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    cost = torch.where((queries == targets) | (queries == targets + 1), 1000.0, torch.inf)
    cost[queries == targets + 1] = 0.0
    cost[0, 0] = 1.0
    check(cost[None], [shape[1]], solve_assignment(cost[None], [shape[1]], method="auction", backend=backend))


EXTREMES = {
    "all alike": torch.full((9, 9), 0.3, dtype=torch.float64),
    "zeros": torch.zeros(6, 9, dtype=torch.float64),
    "the smallest numbers": torch.randint(0, 50, (8, 8)).double() * 5e-324,
    "the largest numbers": torch.randint(-9, 10, (8, 6)).double() * 1e299,
    "far apart": 10.0 ** torch.randint(-200, 200, (9, 9)).double(),
    "far from zero": 1e15 + torch.randint(0, 5, (9, 7)).double(),
    "one large cost": torch.where(torch.eye(9) * 0 + torch.arange(9) == 3, 1e30, torch.rand(9, 9)).double(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_costs(backend: str, name: str) -> None:
    cost = EXTREMES[name].double()
    found = solve_assignment(cost[None], [cost.shape[1]], method="auction", backend=backend)
    above = total(cost, found.query_of_target[0]) - total(cost, by_scipy(cost[None], [cost.shape[1]])[0])
    assert above <= float(found.dual_gap[0]) * (1 + 1e-9)
    assert float(found.dual_gap[0]) <= 9 * 2.0**-45 * float(cost.abs().max()) + 1e-300


@needs_native
def test_any_strides_and_padding() -> None:
    cost = torch.rand(4, 30, 17)
    num_targets = [17, 0, 9, 16]
    expected = solve_assignment(cost, num_targets, method="auction")
    padded = torch.full((4, 30, 40), torch.nan)
    padded[:, :, :17] = cost
    for given_cost in (cost.transpose(1, 2).contiguous().transpose(1, 2), padded[:, :, :17], cost.requires_grad_()):
        found = solve_assignment(given_cost, num_targets, method="auction")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class TestBadInput:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("value", [torch.nan, -torch.inf])
    def test_cost_that_is_no_cost(self, backend: str, value: float) -> None:
        cost = torch.rand(4, 9, 5)
        cost[2, 7, 3] = value
        message = rf"cost must be finite or \+inf, got {value} in problem 2 at query 7 and target 3"
        with pytest.raises(ValueError, match=message):
            assignment(cost, [5, 5, 5, 5], method="auction", backend=backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_cost_too_large_to_add(self, backend: str) -> None:
        cost = torch.rand(2, 4, 3, dtype=torch.float64)
        cost[1, 2, 0] = -2e300
        message = r"cost must be at most 1e\+300 in size, got -2e\+300 in problem 1 at query 2 and target 0"
        with pytest.raises(ValueError, match=message):
            assignment(cost, [3, 3], method="auction", backend=backend)
        assert assignment(cost, [3, 3]).shape == (2, 3)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("shape", [(6, 3), (3, 3), (3, 5)])
    def test_infeasible(self, backend: str, shape: tuple[int, int]) -> None:
        cost = torch.rand(3, *shape)
        cost[1, -1 if shape[0] <= shape[1] else slice(None), -1 if shape[0] > shape[1] else slice(None)] = torch.inf
        with pytest.raises(ValueError, match=r"cost of problem 1 is infeasible: \+inf forbids every way"):
            assignment(cost, [shape[1]] * 3, method="auction", backend=backend)

    def test_method(self) -> None:
        for call in (assignment, solve_assignment):
            with pytest.raises(ValueError, match="method must be one of 'shortest_path', 'auction', got 'hungarian'"):
                call(torch.rand(1, 4, 3), [3], method="hungarian")

    def test_backend(self) -> None:
        with pytest.raises(ValueError, match="backend of auction must be None or one of 'native', 'reference', got"):
            assignment(torch.rand(1, 4, 3), [3], method="auction", backend="cuda")

    def test_no_kernel_for_cuda(self) -> None:
        with (
            torch._subclasses.FakeTensorMode(),
            pytest.raises(NotImplementedError, match="auction cannot run .* the auction has no kernel for CUDA"),
        ):
            from detr_fast.ops.assignment.api import AUCTION

            AUCTION.choose("native", torch.empty(1, 4, 3, device="cuda"))
