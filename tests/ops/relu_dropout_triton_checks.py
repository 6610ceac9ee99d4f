"""What is asked of the Triton relu_dropout wherever it can run: on a GPU, or without one under Triton's interpreter.

Run in a process of its own by ``test_relu_dropout_triton.py``. Not collected by name.
"""

from __future__ import annotations

import pytest
import torch

from detr_fast.ops import relu_dropout
from detr_fast.ops.dropout import Dropout
from ops.relu_dropout_cases import SHAPES, check, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = SHAPES | {"real": (6, 2048)}


def draw(p: float) -> Dropout:
    return Dropout.draw(p, torch.device(DEVICE))


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_is_exact(shape: tuple[int, ...]) -> None:
    check(*make_inputs(shape, torch.float32, DEVICE), draw(0.1), "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    check(*make_inputs(SIZES["odd sizes"], dtype, DEVICE), draw(0.3), "triton")


def test_columns_that_are_not_contiguous() -> None:
    x, grad_y = make_inputs((8, 9), torch.float32, DEVICE)
    check(x.detach().T.requires_grad_(), grad_y.T, draw(0.3), "triton")


def test_overwrites() -> None:
    x, grad_y = make_inputs((9, 70), torch.float32, DEVICE)
    dropout, product = draw(0.3), x * 1
    y = relu_dropout(product, dropout, overwrite=True, backend="triton")
    assert y.data_ptr() == product.data_ptr()
    expected = relu_dropout(x, dropout, backend="reference")
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(out, x, grad_y)[0] for out in (y, expected)))
