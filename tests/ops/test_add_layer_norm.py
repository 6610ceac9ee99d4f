"""Residual, dropout and layer norm: every backend against torch's layer norm in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.ops import _native, add_layer_norm
from detr_fast.ops.add_layer_norm.api import OP
from detr_fast.ops.dropout import Dropout, keep_mask
from ops.add_layer_norm_cases import SHAPES, Case, check, draw, exact_results, make_case, results

NO_NATIVE = _native.load().why_not
needs_native = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_exact(backend: str, shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
    check(make_case(shape, dtype), draw(p), backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_reference_is_torchs_layer_norm(dtype: torch.dtype) -> None:
    case = make_case((7, 3, 33), dtype)
    for found, exact in zip(results(case, None, "reference"), exact_results(case, None), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=200 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_position_there_is_one_result(backend: str) -> None:
    case = make_case((3, 5, 37))
    assert isinstance(add_layer_norm(*case[:4], backend=backend), Tensor)
    check(case, None, backend, with_pos=False)
    check(case, draw(0.3), backend, with_pos=False)


@pytest.mark.parametrize("rows", [1, 5, 7000])
def test_the_quickest_way_without_gradients(rows: int) -> None:
    case = make_case((rows, 5, 37))
    with torch.no_grad():
        found = add_layer_norm(*case[:4], pos=case.pos)
        alone = add_layer_norm(*case[:4])
    x, residual, weight, bias, pos = (t.detach().double() for t in case.tensors)
    y = F.layer_norm(x + residual, weight.shape, weight, bias)
    for result, exact in zip((*found, alone), (y, y + pos, y), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_residual_of_another_dtype(backend: str, dtypes: tuple[torch.dtype, ...], p: float) -> None:
    case = make_case((3, 5, 37))
    x, residual = (t.detach().to(d).requires_grad_() for t, d in zip(case[:2], dtypes, strict=True))
    check(case._replace(x=x, residual=residual), draw(p), backend)
    assert results(case._replace(x=x, residual=residual), None, backend)[0].dtype == torch.float32


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_one_result_only(backend: str, which: int) -> None:
    case = make_case((3, 5, 37), torch.float64)
    outputs = add_layer_norm(*case[:4], pos=case.pos, backend=backend)
    found = torch.autograd.grad(outputs[which], case.tensors, case[5 + which], allow_unused=which == 0)
    x, residual, weight, bias, pos = case.tensors
    y = F.layer_norm(x + residual, weight.shape, weight, bias)
    exact = torch.autograd.grad((y, y + pos)[which], case.tensors, case[5 + which], allow_unused=which == 0)
    assert (found[4] is None) == (which == 0)
    for a, b in zip(found[: 4 + which], exact, strict=False):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
class TestDropout:
    def test_drops_exactly_what_the_mask_says(self, backend: str) -> None:
        dropout = Dropout.draw(0.25, torch.device("cpu"))
        rows, columns = 70, 167
        x = torch.full((rows, columns), 8.0, requires_grad=True)
        residual = torch.randn(rows, columns, requires_grad=True)
        y = add_layer_norm(x, residual, torch.ones(columns), torch.zeros(columns), dropout=dropout, backend=backend)
        y.backward(torch.randn_like(y))
        keep = keep_mask(dropout, rows, columns)
        assert 0.7 < keep.float().mean() < 0.8
        total = residual.detach() + torch.where(keep, 8 * dropout.scale, 0)
        torch.testing.assert_close(y.detach(), F.layer_norm(total, (columns,)), rtol=1e-5, atol=1e-5)
        assert torch.equal(x.grad, torch.where(keep, residual.grad * dropout.scale, 0))

    def test_all_and_none(self, backend: str) -> None:
        case = make_case((3, 5, 37))
        everything, nothing = (Dropout(p, torch.tensor([7])) for p in (1.0, 0.0))
        y = add_layer_norm(*case[:4], dropout=everything, backend=backend)
        expected = add_layer_norm(torch.zeros_like(case.x), *case[1:4], backend=backend)
        assert torch.equal(y, expected)
        kept = add_layer_norm(*case[:4], dropout=nothing, backend=backend)
        assert torch.equal(kept, add_layer_norm(*case[:4], backend=backend))

    def test_a_number_that_is_dropped_is_not_looked_at(self, backend: str) -> None:
        dropout = Dropout.draw(0.5, torch.device("cpu"))
        x = torch.where(keep_mask(dropout, 4, 64), 1.0, torch.nan)
        ones = torch.ones(4, 64), torch.ones(64), torch.ones(64)
        assert add_layer_norm(x, *ones, dropout=dropout, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
class TestStatistics:
    def test_a_mean_far_from_zero_costs_no_digits(self, backend: str) -> None:
        case = make_case((4, 256))
        far = case._replace(residual=(case.residual.detach() + 1000).requires_grad_())
        exact = exact_results(far, None)[0]
        torch.testing.assert_close(results(far, None, backend)[0].double(), exact, rtol=0, atol=2e-4)

    def test_a_row_of_one_value_has_no_variance(self, backend: str) -> None:
        case = make_case((2, 256))
        flat = case._replace(x=torch.full((2, 256), 0.5), residual=torch.full((2, 256), 0.25))
        y = add_layer_norm(*flat[:4], backend=backend)
        assert torch.equal(y, case.bias.expand(2, -1))

    def test_eps_is_added_to_the_variance(self, backend: str) -> None:
        case = make_case((4, 16), torch.float64)
        y = add_layer_norm(*case[:4], eps=0.7, backend=backend)
        torch.testing.assert_close(y, F.layer_norm(case.x + case.residual, (16,), case.weight, case.bias, 0.7))

    def test_rows_do_not_know_each_other(self, backend: str) -> None:
        case = make_case((6, 256))
        broken = case.x.detach().clone()
        broken[2] = torch.nan
        y = add_layer_norm(broken, *case[1:4], backend=backend)
        assert y[2].isnan().all()
        others = [0, 1, 3, 4, 5]
        assert torch.equal(y[others], add_layer_norm(*case[:4], backend=backend)[others])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    case, dropout = make_case((2, 300, 256), dtype), draw(0.1)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(case, dropout, "native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    # The mean of a row of one value is that value, so that y_pos = pos + bias - the bits of a position pass through.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    numbers = numbers[: len(numbers) // 64 * 64].view(-1, 64)
    zeros, halves = torch.zeros_like(numbers), torch.zeros(64, dtype=dtype)
    _, read = add_layer_norm(zeros, zeros, halves, halves, pos=numbers, backend="native")
    assert torch.equal(read, numbers)
    # Between two neighbours, on their middle and beside it; the sum of pos and bias is exact in float32.
    spacing = (torch.rand(64) * 4).floor() / 4
    sums = numbers.float() * (1 + spacing * torch.finfo(dtype).eps)
    _, rounded = add_layer_norm(zeros, zeros, halves, halves, pos=sums, backend="native")
    assert torch.equal(rounded, sums.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_bad_input(backend: str) -> None:
    x, residual, weight, bias, pos, *_ = make_case((2, 3, 8))
    for arguments, options, message in [
        ((x[..., :0], residual, weight, bias), {}, r"x must be \[..., D\] with D at least 1, got \[2, 3, 0\]"),
        ((x, residual[:1], weight, bias), {}, r"residual must be \[2, 3, 8\] as x, got \[1, 3, 8\]"),
        ((x, residual, weight[:7], bias), {}, r"weight must be torch.float32 \[8\], got torch.float32 \[7\]"),
        ((x, residual, weight, bias.double()), {}, r"bias must be torch.float32 \[8\], got torch.float64 \[8\]"),
        ((x, residual, weight, bias), {"pos": pos[:2]}, r"pos must be the last dimensions of x \[2, 3, 8\], got"),
        ((x, residual, weight, bias), {"pos": pos[None, None]}, r"pos must be the last dimensions of x"),
        ((x.long(), residual, weight, bias), {}, "x must be float32, float64, bfloat16 or float16, got torch.int64"),
        ((x, residual.to("meta"), weight, bias), {}, "residual must be on cpu, where x is, got meta"),
        ((x, residual, weight, bias), {"dropout": Dropout(1.5, torch.tensor([1]))}, r"p must be in \[0, 1\], got 1.5"),
        ((x, residual, weight, bias), {"dropout": Dropout(0.5, torch.tensor(1))}, r"seed must be int64 \[1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_layer_norm(*arguments, **options, backend=backend)


def test_a_backend_that_cannot_run_says_why() -> None:
    case = make_case((1, 8))
    meta = [t.detach().to("meta") for t in case[:4]]
    with pytest.raises(NotImplementedError, match="there is no native code for meta devices"):
        add_layer_norm(*meta, backend="native")
    assert OP.choose(None, case.x).name == ("reference" if NO_NATIVE else "native")


def test_the_gradient_has_no_gradient() -> None:
    case = make_case((2, 8))
    (grad,) = torch.autograd.grad(add_layer_norm(*case[:4]).square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class Block(nn.Module):
    """Two uses after each other, the second's position shared by the images."""

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(16), dropout

    def forward(self, x: Tensor, residual: Tensor, pos: Tensor, seed: Tensor) -> Tensor:
        dropout = Dropout(0.2, seed) if self.dropout else None
        y = add_layer_norm(x, residual, self.norm.weight, self.norm.bias, dropout=dropout)
        y, y_pos = add_layer_norm(x, y, self.norm.weight, self.norm.bias, pos=pos, dropout=dropout)
        return y * 2 + y_pos.sin()


def block_inputs() -> tuple[Tensor, ...]:
    x, residual, _, _, pos, *_ = make_case((3, 5, 16))
    return x, residual, pos, torch.tensor([11])


class TestTorchSeesOneNode:
    @pytest.mark.parametrize("p", [0.0, 0.1])
    @pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
    def test_opcheck(self, dtypes: tuple[torch.dtype, ...], p: float) -> None:
        case: Case = make_case((3, 4, 16))
        x, residual = (t.detach().to(d).requires_grad_() for t, d in zip(case[:2], dtypes, strict=True))
        seed = torch.tensor([5]) if p else None
        for pos in (None, case.pos):
            arguments = (x, residual, case.weight, case.bias, pos, seed, p, 1e-5)
            torch.library.opcheck(torch.ops.detr_fast.add_layer_norm.default, arguments)

    @pytest.mark.parametrize("dropout", [False, True])
    def test_compiled(self, dropout: bool) -> None:
        block, inputs = Block(dropout), block_inputs()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        eager, found = block(*inputs), compiled(*inputs)
        assert torch.equal(found, eager)
        wanted = (*inputs[:3], *block.parameters())
        grads = [torch.autograd.grad(y.square().sum(), wanted) for y in (eager, found)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)

    def test_exported(self) -> None:
        block, (x, residual, pos, seed) = Block(True), block_inputs()
        batch = torch.export.Dim("batch", min=2)
        shapes = ({0: batch}, {0: batch}, None, None)
        program = torch.export.export(block, (x, residual, pos, seed), dynamic_shapes=shapes)
        nodes = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert sum("add_layer_norm" in n for n in nodes) == 2, nodes
        other = (torch.randn(7, 5, 16), torch.randn(7, 5, 16), pos, seed)
        torch.testing.assert_close(program.module()(*other), block(*other))
