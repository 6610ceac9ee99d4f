"""The op by csrc/cpu/add_layer_norm.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.add_layer_norm.types import Gradients, Inputs, Normalized

NO_ROWS = (0, 0, 0)


def why_not(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"there is no native code for {x.device.type} devices"
    return _native.why_not(x.device)


def add_layer_norm_native(inputs: Inputs, bias: Tensor, pos: Tensor | None, eps: float) -> Normalized:
    arguments = _Arguments(inputs)
    bias = _vector(bias, inputs.compute_dtype)
    y = torch.empty(inputs.x.shape, dtype=inputs.dtype)
    y_pos = None if pos is None else torch.empty_like(y)
    mean, rstd = (torch.empty(len(y), dtype=inputs.compute_dtype) for _ in range(2))
    _native.module().add_layer_norm_cpu(
        arguments.native,
        bias.data_ptr(),
        eps,
        arguments.rows(pos),
        0 if pos is None else len(pos),
        y.data_ptr(),
        0 if y_pos is None else y_pos.data_ptr(),
        _native.DTYPES[y.dtype],
        mean.data_ptr(),
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return Normalized(y, y_pos, mean, rstd)


def add_layer_norm_native_backward(
    inputs: Inputs, mean: Tensor, rstd: Tensor, grad_y: Tensor | None, grad_y_pos: Tensor | None
) -> Gradients:
    arguments = _Arguments(inputs)
    x, residual, weight, _ = inputs
    grad_x = None if inputs.one_gradient else torch.empty(x.shape, dtype=x.dtype)
    grad_residual = torch.empty(residual.shape, dtype=residual.dtype)
    grad_weight, grad_bias = (torch.empty(len(weight), dtype=inputs.compute_dtype) for _ in range(2))
    _native.module().add_layer_norm_backward_cpu(
        arguments.native,
        arguments.rows(grad_y),
        arguments.rows(grad_y_pos),
        mean.data_ptr(),
        rstd.data_ptr(),
        0 if grad_x is None else grad_x.data_ptr(),
        grad_residual.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        torch.get_num_threads(),
    )
    return Gradients(grad_x, grad_residual, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype))


class _Arguments:
    """Inputs as addresses, strides and dtypes; holds the tensors that the addresses point into."""

    def __init__(self, inputs: Inputs) -> None:
        x, residual, weight, dropout = inputs
        self.kept: list[Tensor] = [_vector(weight, inputs.compute_dtype)]
        self.native: Any = _native.module().AddLayerNormInputs(
            x.shape,
            self.rows(x),
            self.rows(residual),
            self.kept[0].data_ptr(),
            0 if dropout is None else dropout.seed.data_ptr(),
            0 if dropout is None else dropout.threshold,
            1.0 if dropout is None else dropout.scale,
            inputs.compute_dtype == torch.float64,
        )

    def rows(self, matrix: Tensor | None) -> tuple[int, int, int]:
        """Address, stride and dtype of a matrix, whose columns are made contiguous where they are not."""
        if matrix is None:
            return NO_ROWS
        if matrix.stride(1) != 1:
            matrix = matrix.contiguous()
            self.kept.append(matrix)
        return matrix.data_ptr(), matrix.stride(0), _native.DTYPES[matrix.dtype]


def _vector(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype and x.is_contiguous() else x.detach().to(dtype).contiguous()
