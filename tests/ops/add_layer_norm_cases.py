"""Inputs of awkward shapes for the tests of add_layer_norm, and its oracle: torch's layer norm in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops import add_layer_norm
from detr_fast.ops.dropout import Dropout, keep_mask

SHAPES = {
    "one number": (1, 1),
    "one row": (1, 256),
    "one column": (5, 1),
    "odd sizes": (3, 5, 37),
    "no rows": (0, 32),
    "an image of no tokens": (2, 0, 32),
    "more columns than a vector and less than two": (4, 129),
    "the widest": (2, 2048),
    "real": (2, 100, 256),
}
# Of a sum of a few rounded terms.
FEW_ULP = 4


class Case(NamedTuple):
    """Differentiable inputs; the gradients of y and of y + pos that come in."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    pos: Tensor
    grad_y: Tensor
    grad_y_pos: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self[:5]


def make_case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Case:
    """Random numbers; x and the gradient are slices of wider tensors, and pos is shared by what comes first."""
    columns = shape[-1]
    wide = torch.randn(*shape[:-1], columns + 3)
    grad_y, grad_y_pos = torch.randn(*shape[:-1], columns + 5)[..., 5:], torch.randn(shape)
    vectors = 1 + torch.randn(columns) / 2, torch.randn(columns)
    tensors = [wide[..., 2:-1], 2 + 3 * torch.randn(shape), *vectors, torch.randn(shape[1:])]
    inputs = [x.to(dtype).to(device).requires_grad_() for x in tensors]
    return Case(*inputs, grad_y.to(dtype).to(device), grad_y_pos.to(dtype).to(device))


def draw(p: float, device: str = "cpu") -> Dropout | None:
    return Dropout.draw(p, torch.device(device)) if p else None


def results(case: Case, dropout: Dropout | None, backend: str | None, with_pos: bool = True) -> list[Tensor]:
    """The outputs, and the gradients of all inputs."""
    pos = case.pos if with_pos else None
    outputs = add_layer_norm(*case[:4], dropout=dropout, pos=pos, backend=backend)
    outputs = outputs if with_pos else (outputs,)
    inputs = case.tensors if with_pos else case.tensors[:4]
    return [*outputs, *torch.autograd.grad(outputs, inputs, case[5 : 5 + len(outputs)])]


def exact_results(case: Case, dropout: Dropout | None, with_pos: bool = True) -> list[Tensor]:
    """The same by torch's layer norm in float64."""
    x, residual, weight, bias, pos = inputs = [t.detach().double().requires_grad_() for t in case.tensors]
    dropped = x
    if dropout is not None:
        keep = keep_mask(dropout, x.numel() // x.shape[-1], x.shape[-1]).view(x.shape)
        dropped = torch.where(keep, x * dropout.scale, 0)
    y = F.layer_norm(residual + dropped, weight.shape, weight, bias)
    outputs = (y, y + pos)[: 1 + with_pos]
    grads = torch.autograd.grad(outputs, inputs[: 4 + with_pos], [g.double() for g in case[5 : 5 + len(outputs)]])
    return [*outputs, *grads]


def check(case: Case, dropout: Dropout | None, backend: str, with_pos: bool = True) -> None:
    """Error against float64 at most twice the reference's own, plus a few ulp of the largest number."""
    exact = exact_results(case, dropout, with_pos)
    reference = results(case, dropout, "reference", with_pos)
    found = results(case, dropout, backend, with_pos)
    names = [*("y", "y_pos")[: 1 + with_pos], "x", "residual", "weight", "bias", "pos"]
    for name, a, b, c in zip(names, found, reference, exact, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape == c.shape, name
        assert a.isfinite().all(), name
        if a.numel() == 0:
            continue
        largest = max(
            float(c.detach().abs().max()), 1.0
        )  # a row of one column has gradients that are 0 but for rounding
        allowed = 2 * (b.double() - c).abs().max() + FEW_ULP * torch.finfo(a.dtype).eps * largest
        assert (a.double() - c).abs().max() <= allowed, name
