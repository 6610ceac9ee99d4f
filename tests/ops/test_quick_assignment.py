"""The assignment's usual call in one step of native code: what it takes, what it leaves to the ordinary way."""

from __future__ import annotations

import gc
import resource
import sys
import threading

import pytest
import torch
from torch import Tensor

from detr_fast.ops import assignment
from detr_fast.ops.assignment.native import quick_assignment
from ops.assignment_cases import by_scipy, needs_native

needs_exchange = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="this torch hands out no functions to exchange tensors"
)


@pytest.fixture()
def cost() -> Tensor:
    return torch.rand(3, 20, 7)


@needs_native
@needs_exchange
class TestTakes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("num_targets", [[7, 0, 3], [7, 7, 7], [0, 0, 0]])
    def test_the_usual_call(self, cost: Tensor, dtype: torch.dtype, num_targets: list[int]) -> None:
        cost = cost.to(dtype)
        found = quick_assignment(cost, num_targets)
        assert found is not None
        assert (found.dtype, found.shape, found.is_contiguous()) == (torch.int64, (3, 7), True)
        assert torch.equal(found, by_scipy(cost, num_targets))

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            lambda x: torch.cat([x, x], -1)[:, ::2, 3:10],
            lambda x: x[1:2].expand(3, -1, -1),
            lambda x: x.requires_grad_(),
        ],
        ids=["targets first", "slice", "expanded", "requires grad"],
    )
    def test_any_strides(self, cost: Tensor, view) -> None:
        found = quick_assignment(view(cost), [7, 5, 1])
        assert found is not None
        assert not found.requires_grad
        assert torch.equal(found, by_scipy(view(cost).detach(), [7, 5, 1]))

    def test_more_problems_than_fit_on_the_stack(self) -> None:
        counts = torch.randint(0, 8, (300,)).tolist()
        cost = torch.rand(300, 20, 7)
        found = quick_assignment(cost, counts)
        assert found is not None
        assert torch.equal(found, by_scipy(cost, counts))

    @pytest.mark.parametrize("shape", [(0, 20, 7), (2, 0, 0), (2, 5, 0), (2, 0, 4)])
    def test_nothing_to_match(self, shape: tuple[int, ...]) -> None:
        found = quick_assignment(torch.rand(shape), [shape[2]] * shape[0])
        assert found is not None
        assert torch.equal(found, torch.full((shape[0], shape[2]), -1))

    def test_the_result_is_a_tensor_like_others(self, cost: Tensor) -> None:
        found = quick_assignment(cost, [7, 7, 7])
        assert found is not None
        kept = found[1]
        expected = kept.clone()
        del found
        gc.collect()
        torch.rand(1000)
        assert torch.equal(kept, expected)
        kept += 1
        assert torch.equal(kept, expected + 1)

    def test_its_memory_is_given_back(self) -> None:
        cost, counts = torch.rand(1, 1000, 1000).repeat(50, 1, 1)[:, :2], [0] * 50
        for _ in range(20):
            quick_assignment(cost, counts)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(1000):  # 400 MB in all
            quick_assignment(cost, counts)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000

    def test_other_threads_run_meanwhile(self) -> None:
        # All rows want the same columns: it takes long enough for the other thread to be given a core.
        square = torch.outer(torch.rand(700), torch.rand(700))[None]
        turns: list[int] = []
        done = threading.Event()

        def count() -> None:
            while not done.is_set():
                turns.append(1)

        counter = threading.Thread(target=count)
        counter.start()
        before = len(turns)
        quick_assignment(square, [700])
        after = len(turns)
        done.set()
        counter.join()
        assert after > before


@needs_native
class TestLeavesToTheOrdinaryWay:
    @pytest.mark.parametrize(
        "call",
        [
            lambda cost: (cost, (7, 7, 7)),
            lambda cost: (cost, [7, 7]),
            lambda cost: (cost, [7, 8, 7]),
            lambda cost: (cost, [7, -1, 7]),
            lambda cost: (cost, [7, 2**70, 7]),
            lambda cost: (cost, [7, 2.0, 7]),
            lambda cost: (cost[0], [7] * 20),
            lambda cost: (cost.bfloat16(), [7, 7, 7]),
            lambda cost: (cost.long(), [7, 7, 7]),
            lambda cost: (cost.to("meta"), [7, 7, 7]),
            lambda cost: (cost.to_sparse(), [7, 7, 7]),
            lambda cost: (torch.nn.Parameter(cost), [7, 7, 7]),
            lambda cost: (cost.numpy(), [7, 7, 7]),
            lambda cost: (None, None),
            lambda cost: (torch.full_like(cost, torch.inf), [7, 7, 7]),
            lambda cost: (torch.full_like(cost, torch.nan), [7, 7, 7]),
        ],
    )
    def test_what_is_unusual_or_has_no_solution(self, cost: Tensor, call) -> None:
        assert quick_assignment(*call(cost)) is None

    def test_within_vmap(self, cost: Tensor) -> None:
        def inside(matrix: Tensor) -> Tensor:
            assert quick_assignment(matrix[None], [7]) is None
            return matrix

        torch.vmap(inside)(cost)

    def test_a_named_backend_is_taken(self, cost: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules["detr_fast.ops.assignment.api"], "quick_assignment", pytest.fail)
        assert torch.equal(assignment(cost, [7, 7, 7], backend="native"), by_scipy(cost, [7, 7, 7]))
