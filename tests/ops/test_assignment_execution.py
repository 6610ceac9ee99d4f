"""Where the assignment op runs: compiled and exported, from threads and forked processes, and on CUDA."""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest
import torch
from torch import Tensor

from detr_fast.ops import assignment
from ops.assignment_cases import by_scipy, needs_cuda, needs_native


class TestTorch:
    def test_opcheck(self) -> None:
        op = torch.ops.detr_fast.assignment.default
        torch.library.opcheck(op, (torch.rand(3, 10, 4), [4, 0, 2]))
        torch.library.opcheck(op, (torch.rand(3, 10, 4, dtype=torch.float64), [4, 0, 2], "shortest_path", "reference"))
        torch.library.opcheck(op, (torch.rand(2, 10, 4, requires_grad=True), [4, 1]))

    def test_compiles_to_one_node_that_holds_for_other_counts(self) -> None:
        graphs = []

        def count_graphs(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        def matched_first_query(cost: Tensor, boxes: Tensor) -> Tensor:
            return assignment(cost, [boxes.shape[0], 2])[:, 0] + 1

        compiled = torch.compile(matched_first_query, backend=count_graphs, fullgraph=True)
        cost = torch.rand(2, 20, 9)
        for count in (3, 4, 5, 9, 7, 2):
            boxes = torch.zeros(count, 4)
            assert torch.equal(compiled(cost, boxes), matched_first_query(cost, boxes))
        assert len(graphs) == 2, "the second graph takes every count"
        calls = [
            node for node in graphs[-1].graph.nodes if node.op == "call_function" and "assignment" in str(node.target)
        ]
        assert len(calls) == 1

    def test_exports(self) -> None:
        class Matcher(torch.nn.Module):
            def forward(self, cost: Tensor) -> Tensor:
                return assignment(cost, [3, 4])

        cost = torch.rand(2, 10, 4)
        exported = torch.export.export(Matcher(), (cost,))
        assert torch.ops.detr_fast.assignment.default in [node.target for node in exported.graph.nodes]
        assert torch.equal(exported.module()(cost), by_scipy(cost, [3, 4]))

    def test_fake_tensors_take_no_memory_and_no_time(self) -> None:
        with torch._subclasses.FakeTensorMode():
            found = assignment(torch.empty(64, 300, 100, device="cuda"), [100] * 64)
        assert found.shape == (64, 100)
        assert (found.dtype, found.device.type) == (torch.int64, "cuda")


@needs_native
class TestThreads:
    @pytest.fixture(autouse=True)
    def two_threads(self):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    @pytest.fixture()
    def problems(self) -> tuple[Tensor, list[int], Tensor]:
        """Enough work for the pool to be used."""
        num_targets = torch.randint(0, 41, (64,)).tolist()
        cost = torch.rand(64, 100, 40)
        return cost, num_targets, by_scipy(cost, num_targets)

    def test_callers_do_not_disturb_one_another(self, problems: tuple) -> None:
        cost, num_targets, expected = problems
        found: list[Tensor] = []

        def call() -> None:
            found.extend(assignment(cost, num_targets, backend="native") for _ in range(10))

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert len(found) == 40
        assert all(torch.equal(f, expected) for f in found)

    def test_other_python_threads_go_on(self) -> None:
        cost = torch.rand(1, 900, 1) + 0.001 * torch.rand(1, 900, 900)  # takes tenths of a second
        call: list[float] = []

        def solve() -> None:
            call.append(time.perf_counter())
            assignment(cost, [900], backend="native")
            call.append(time.perf_counter())

        caller = threading.Thread(target=solve)
        caller.start()
        ticks = []
        while caller.is_alive():
            time.sleep(0.001)
            ticks.append(time.perf_counter())
        began, ended = call
        margin = 0.1 * (ended - began)
        assert any(began + margin < tick < ended - margin for tick in ticks)

    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_a_forked_process_can_call(self, problems: tuple) -> None:
        cost, num_targets, expected = problems
        assert torch.equal(assignment(cost, num_targets, backend="native"), expected)  # the pool has threads now
        queue = multiprocessing.get_context("fork").SimpleQueue()

        def call() -> None:
            queue.put(assignment(cost, num_targets, backend="native").tolist())

        child = multiprocessing.get_context("fork").Process(target=call)
        child.start()
        child.join(60)
        hangs = child.is_alive()
        child.kill()
        assert not hangs
        assert queue.get() == expected.tolist()

    def test_the_first_broken_problem_is_named(self) -> None:
        cost = torch.rand(64, 100, 40)
        cost[17, 3, 2] = torch.nan
        cost[40, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="problem 17 at query 3 and target 2"):
            assignment(cost, [40] * 64, backend="native")


@needs_cuda
class TestCuda:
    def test_does_not_wait_for_the_device(self) -> None:
        cost = torch.rand(48, 100, 20, device="cuda")
        num_targets = torch.randint(0, 21, (48,)).tolist()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = assignment(cost, num_targets, backend="native")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found.cpu(), by_scipy(cost, num_targets))

    def test_is_captured_and_replayed_with_other_costs(self) -> None:
        cost = torch.rand(8, 300, 100, device="cuda")
        num_targets = torch.randint(0, 101, (8,)).tolist()
        assignment(cost, num_targets, backend="native")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = assignment(cost, num_targets, backend="native")
        for _ in range(3):
            cost.copy_(torch.rand(8, 300, 100))
            graph.replay()
            assert torch.equal(found.cpu(), by_scipy(cost, num_targets))

    def test_large_problems_and_broken_ones(self) -> None:
        cost = torch.rand(3, 1500, 1200, device="cuda")
        cost[1, 3, 5] = torch.nan
        found = assignment(cost, [1200, 1200, 700], backend="native").cpu()
        assert (found[1] == -1).all()
        assert torch.equal(found[[0, 2]], by_scipy(cost[[0, 2]], [1200, 700]))
