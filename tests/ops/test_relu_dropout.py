"""ReLU and dropout in one pass: every backend against torch's ReLU and the mask, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detr_fast.ops import _native, relu_dropout
from detr_fast.ops.dropout import Dropout, keep_mask
from detr_fast.ops.relu_dropout.api import OP
from ops.relu_dropout_cases import SHAPES, check, make_inputs

NO_NATIVE = _native.load().why_not
needs_native = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(p: float) -> Dropout:
    return Dropout.draw(p, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_exact(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for p in (0.1, 0.7):
        check(*make_inputs(shape, dtype), draw(p), backend)


@pytest.mark.parametrize("backend", BACKENDS)
class TestEdges:
    def test_all_and_none_are_dropped(self, backend: str) -> None:
        x, _ = make_inputs((9, 70), torch.float32)
        assert torch.equal(relu_dropout(x, draw(1.0), backend=backend), torch.zeros_like(x))
        assert torch.equal(relu_dropout(x, draw(0.0), backend=backend), x.relu())
        assert torch.equal(relu_dropout(x, backend=backend), x.relu())

    def test_nan_stays_where_it_is_kept(self, backend: str) -> None:
        dropout = draw(0.5)
        y = relu_dropout(torch.full((4, 64), torch.nan), dropout, backend=backend)
        assert torch.equal(y.isnan(), keep_mask(dropout, 4, 64))

    def test_columns_that_are_not_contiguous(self, backend: str) -> None:
        x, grad_y = make_inputs((64, 9), torch.float32)
        check(x.detach().T.requires_grad_(), grad_y.T, draw(0.3), backend)

    @pytest.mark.parametrize("p", [0.0, 0.3])
    def test_overwriting_takes_no_memory_and_has_the_same_gradient(self, backend: str, p: float) -> None:
        x, grad_y = make_inputs((9, 70), torch.float32)
        dropout = draw(p)
        expected = relu_dropout(x, dropout, backend=backend)
        product = x * 1  # not a leaf, as the result of a layer
        found = relu_dropout(product, dropout, overwrite=True, backend=backend)
        assert found.data_ptr() == product.data_ptr() and torch.equal(found, expected)
        grads = [torch.autograd.grad(y, x, grad_y)[0] for y in (found, expected)]
        assert torch.equal(*grads)

    def test_the_layout_of_what_is_overwritten_may_be_any(self, backend: str) -> None:
        wide = torch.randn(6, 20)
        before, dropout = wide.clone(), draw(0.3)
        y = relu_dropout(wide[:, 3:9], dropout, overwrite=True, backend=backend)
        assert torch.equal(y, relu_dropout(before[:, 3:9], dropout, backend=backend))
        assert torch.equal(wide[:, :3], before[:, :3]) and torch.equal(wide[:, 9:], before[:, 9:])


def test_what_is_not_to_be_overwritten_is_not() -> None:
    x, _ = make_inputs((9, 70), torch.float32)
    before = x.detach().clone()
    relu_dropout(x, draw(0.5))
    assert torch.equal(x, before)


@needs_native
def test_the_number_of_threads_changes_no_bit() -> None:
    x, _ = make_inputs((100, 2048), torch.float32)
    dropout, before, found = draw(0.1), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(relu_dropout(x, dropout))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_refuses_bad_input() -> None:
    x = torch.zeros(2, 3)
    for bad, dropout, message in [
        (torch.tensor(1.0), None, r"x must be .* \[..., D\] with D at least 1, got torch.float32 \[\]"),
        (x[:, :0], None, r"with D at least 1, got torch.float32 \[2, 0\]"),
        (x.int(), None, "x must be float32, float64, bfloat16 or float16 .* got torch.int32"),
        (x, Dropout(-0.1, torch.tensor([1])), r"p must be in \[0, 1\], got -0.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            relu_dropout(bad, dropout)
    with pytest.raises(NotImplementedError, match="there is no native code for meta devices"):
        relu_dropout(x.to("meta"), backend="native")
    assert OP.choose(None, x).name == ("reference" if NO_NATIVE else "native")


class TestTorchSeesOneNode:
    def test_opcheck(self) -> None:
        x, _ = make_inputs((3, 5, 37), torch.float32)
        torch.library.opcheck(torch.ops.detr_fast.relu_dropout.default, (x, torch.tensor([5]), 0.1))

    def test_compiled(self) -> None:
        def block(x: Tensor, seed: Tensor) -> Tensor:
            return relu_dropout(x * 2, Dropout(0.2, seed), overwrite=True).sin() + relu_dropout(x)

        x, grad_y = make_inputs((3, 5, 37), torch.float32)
        seed = torch.tensor([3])
        results = [block(x, seed), torch.compile(block, backend="aot_eager", fullgraph=True)(x, seed)]
        assert torch.equal(*results)
        grads = [torch.autograd.grad(y, x, grad_y)[0] for y in results]
        assert torch.equal(*grads)
