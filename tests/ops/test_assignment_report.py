"""What ``solve_assignment`` says of problems that are solved, cannot be solved, or are no problems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from detr_fast.ops import AssignmentOutcome, assignment, solve_assignment
from ops.assignment_cases import BACKENDS, KINDS, SHAPES, by_scipy, needs_cuda, needs_native, random_cost

METHODS = ["shortest_path", "auction"]
SOLVED, INFEASIBLE, INVALID = AssignmentOutcome


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shortest_paths_are_scipys_and_proven(shape: str, backend: str, kind: str) -> None:
    queries, targets, num_targets = SHAPES[shape]
    cost = random_cost(kind, len(num_targets), queries, targets)
    report = solve_assignment(cost, num_targets, backend=backend)
    assert torch.equal(report.query_of_target, by_scipy(cost, num_targets))
    assert report.outcome.tolist() == [SOLVED] * len(num_targets)
    assert report.dual_gap.dtype == torch.float64
    assert (report.dual_gap >= 0).all()
    # What adding two costs may be wrong by, in every row.
    assert (report.dual_gap <= max(queries, targets) * 4 * 2.0**-52).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6, 6), (9, 5), (4, 8)])
def test_total_less_gap_is_below_the_linear_programs_optimum(backend: str, method: str, shape: tuple[int, int]) -> None:
    """Of the assignment's linear relaxation, which any dual solution bounds from below, solved by another algorithm."""
    queries, targets = shape
    cost = torch.randn(1, queries, targets, dtype=torch.float64)
    report = solve_assignment(cost, [targets], method=method, backend=backend)
    of_query, of_target = np.kron(np.eye(queries), np.ones(targets)), np.kron(np.ones(queries), np.eye(targets))
    fewer, more = (of_query, of_target) if queries <= targets else (of_target, of_query)
    relaxed = linprog(cost.flatten().numpy(), A_eq=fewer, b_eq=np.ones(len(fewer)), A_ub=more, b_ub=np.ones(len(more)))
    matched = report.query_of_target[0] >= 0
    total = cost[0, report.query_of_target[0, matched], torch.arange(targets)[matched]].sum()
    assert relaxed.status == 0
    assert float(total - report.dual_gap[0]) <= relaxed.fun + 1e-9
    assert float(total) >= relaxed.fun - 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_raises_for_values(backend: str, method: str) -> None:
    cost = torch.rand(7, 6, 4)
    cost[0, 4, 1] = torch.nan
    cost[1, :, 2] = torch.inf
    cost[2, 0, 0] = -torch.inf
    cost[4, :, 2] = torch.inf  # but then it is not a target
    cost[5] = torch.inf
    cost[6, 0] = torch.inf  # one query less
    num_targets = [4, 4, 4, 4, 2, 1, 4]
    report = solve_assignment(cost, num_targets, method=method, backend=backend)
    assert report.outcome.tolist() == [INVALID, INFEASIBLE, INVALID, SOLVED, SOLVED, INFEASIBLE, SOLVED]
    unsolved = report.outcome != SOLVED
    assert (report.query_of_target[unsolved] == -1).all()
    assert (report.dual_gap[unsolved] == torch.inf).all()
    solved = torch.tensor([3, 4, 6])
    assert torch.equal(report.query_of_target[solved], by_scipy(cost[solved], [4, 2, 4]))
    assert (report.dual_gap[solved] < 1e-6).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_problems_with_nothing_to_match_are_solved(backend: str, method: str) -> None:
    for shape, num_targets in (((2, 0, 3), [3, 1]), ((2, 5, 3), [0, 0]), ((0, 5, 3), []), ((1, 5, 0), [0])):
        report = solve_assignment(torch.full(shape, torch.nan), num_targets, method=method, backend=backend)
        assert (report.query_of_target == -1).all()
        assert report.outcome.tolist() == [SOLVED] * shape[0]
        assert report.dual_gap.tolist() == [0.0] * shape[0]


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(300, 100), (400, 40), (200, 200), (20, 20)])
def test_the_gap_of_every_solver_of_the_cpu(shape: tuple[int, int], kind: str) -> None:
    """Few rows, many rows, small squares, and rows that want the same are solved in four ways."""
    cost = random_cost(kind, 1, *shape)
    report = solve_assignment(cost, [shape[1]], backend="native")
    assert 0 <= float(report.dual_gap[0]) <= shape[0] * 4 * 2.0**-52
    assert torch.equal(report.query_of_target, assignment(cost, [shape[1]], backend="native"))


@pytest.mark.parametrize("method", METHODS)
def test_opcheck(method: str) -> None:
    solve = torch.ops.detr_fast.solve_assignment.default
    torch.library.opcheck(solve, (torch.rand(3, 10, 4), [4, 0, 2], method))
    torch.library.opcheck(solve, (torch.rand(3, 10, 4, dtype=torch.float64), [4, 0, 2], method, "reference"))
    torch.library.opcheck(torch.ops.detr_fast.assignment.default, (torch.rand(2, 10, 4), [4, 1], method))


@pytest.mark.parametrize("method", METHODS)
def test_compiles_and_exports(method: str) -> None:
    class Solver(torch.nn.Module):
        def forward(self, cost: torch.Tensor) -> tuple[torch.Tensor, ...]:
            report = solve_assignment(cost, [3, 4], method=method)
            return report.query_of_target + 0, report.outcome + 0, report.dual_gap + assignment(cost, [3, 4])[0, 0]

    cost = torch.rand(2, 10, 4)
    expected = Solver()(cost)
    compiled = torch.compile(Solver(), backend="eager", fullgraph=True)(cost)
    exported = torch.export.export(Solver(), (cost,))
    called = [node.target for node in exported.graph.nodes]
    assert called.count(torch.ops.detr_fast.solve_assignment.default) == 1
    for found in (compiled, exported.module()(cost)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_cuda
def test_reports_of_a_captured_graph_change_with_its_inputs() -> None:
    cost = torch.rand(3, 60, 20, device="cuda")
    solve_assignment(cost, [20, 7, 20])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = solve_assignment(cost, [20, 7, 20])
    for broken in range(3):
        costs = torch.rand(3, 60, 20)
        costs[broken, 3, 2] = torch.nan
        cost.copy_(costs)
        graph.replay()
        assert (report.outcome.cpu() == INVALID).tolist() == [broken == problem for problem in range(3)]
        assert float(report.dual_gap[report.outcome == SOLVED].max()) < 1e-12
