"""Inputs of awkward shapes for the tests of relu_dropout, and its oracle: torch's ReLU in float64, and the mask."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops import relu_dropout
from detr_fast.ops.dropout import Dropout, keep_mask

SHAPES = {
    "one number": (1, 1),
    "one dimension": (37,),
    "odd sizes": (3, 5, 37),
    "no rows": (0, 32),
    "a number more than a block": (5, 257),
    "real": (100, 2048),
}


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """x, with numbers that are 0 among its own; and a gradient that is a slice of a wider tensor."""
    x = torch.randn(shape)
    x = torch.where(torch.rand(shape) < 0.1, 0.0, x).to(dtype).to(device).requires_grad_()
    return x, torch.randn(*shape[:-1], shape[-1] + 3)[..., 2:-1].to(dtype).to(device)


def check(x: Tensor, grad_y: Tensor, dropout: Dropout, backend: str) -> None:
    """One product of two numbers: right to one rounding. What is dropped, and what is kept, is so exactly."""
    exact = x.detach().double().requires_grad_()
    keep = keep_mask(dropout, x.numel() // x.shape[-1], x.shape[-1]).view(x.shape)
    expected = torch.where(keep, exact.relu() * dropout.scale, 0)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad_y.double())
    y = relu_dropout(x, dropout, backend=backend)
    (grad,) = torch.autograd.grad(y, x, grad_y)
    for found, wanted in ((y, expected), (grad, expected_grad)):
        assert found.dtype == x.dtype and found.shape == x.shape
        assert torch.equal(found == 0, wanted == 0)
        info = torch.finfo(x.dtype)  # a number below the normal ones has fewer digits
        torch.testing.assert_close(found.double(), wanted, rtol=info.eps, atol=info.tiny * info.eps)
