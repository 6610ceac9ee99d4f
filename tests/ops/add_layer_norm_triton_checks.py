"""What is asked of the Triton add_layer_norm wherever it can run: on a GPU, or without one under Triton's interpreter.

The interpreter has to be chosen before the kernels are imported, so ``test_add_layer_norm_triton.py`` runs this file in
a process of its own. Not collected by name.
"""

from __future__ import annotations

import pytest
import torch

from detr_fast.ops import add_layer_norm
from detr_fast.ops.add_layer_norm import triton_impl
from detr_fast.ops.dropout import keep_mask
from ops.add_layer_norm_cases import SHAPES, check, draw, make_case, results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes a hundredth of a second for a program.
SIZES = SHAPES | {"real": (2, 5, 256), "a row and a half of DETR's": (3, 384)}


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_is_exact(shape: tuple[int, ...]) -> None:
    check(make_case(shape, device=DEVICE), None, "triton")
    check(make_case(shape, device=DEVICE), draw(0.1, DEVICE), "triton")


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, p: float) -> None:
    check(make_case(SIZES["odd sizes"], dtype, DEVICE), draw(p, DEVICE), "triton")


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_a_residual_of_another_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    case = make_case(SIZES["odd sizes"], device=DEVICE)
    x, residual = (t.detach().to(d).requires_grad_() for t, d in zip(case[:2], dtypes, strict=True))
    check(case._replace(x=x, residual=residual), None, "triton", with_pos=False)
    check(case._replace(x=x, residual=residual), draw(0.3, DEVICE), "triton", with_pos=False)


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_of_one_result_only(which: int) -> None:
    case = make_case(SIZES["odd sizes"], torch.float64, DEVICE)
    grads = []
    for backend in ("triton", "reference"):
        outputs = add_layer_norm(*case[:4], pos=case.pos, backend=backend)
        grads.append(torch.autograd.grad(outputs[which], case.tensors[:4], case[5 + which]))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


def test_drops_exactly_what_the_mask_says() -> None:
    dropout = draw(0.25, DEVICE)
    x = torch.ones(5, 300, device=DEVICE, requires_grad=True)
    residual = torch.randn(5, 300, device=DEVICE, requires_grad=True)
    vector = torch.ones(300, device=DEVICE)
    y = add_layer_norm(x, residual, vector, vector, dropout=dropout, backend="triton")
    y.backward(torch.randn_like(y))
    assert torch.equal(x.grad, torch.where(keep_mask(dropout, 5, 300), residual.grad * dropout.scale, 0))


def test_columns_that_are_not_contiguous() -> None:
    case = make_case((4, 8), device=DEVICE)
    turned = [t.detach().T.contiguous().T.requires_grad_() for t in case[:2]]
    check(case._replace(x=turned[0], residual=turned[1]), None, "triton")


def test_more_rows_than_programs_and_the_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_impl, "BACKWARD_PROGRAMS", 3)
    case, dropout = make_case((30, 256), device=DEVICE), draw(0.1, DEVICE)
    check(case, dropout, "triton")
    twice = [results(case, dropout, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
