"""The op by csrc/cpu/relu_dropout.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.dropout import Dropout


def why_not(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"there is no native code for {x.device.type} devices"
    return _native.why_not(x.device)


def relu_dropout_native(x: Tensor, dropout: Dropout, overwrite: bool = False) -> Tensor:
    y = x if overwrite and x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)
    _native.module().relu_dropout_cpu(
        x.shape,
        _rows(x),
        dropout.seed.data_ptr(),
        dropout.threshold,
        dropout.scale,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return x.copy_(y) if overwrite and y is not x else y


def relu_dropout_native_backward(grad_y: Tensor, y: Tensor, scale: float) -> Tensor:
    grad_x = torch.empty(y.shape, dtype=y.dtype)
    _native.module().relu_dropout_backward_cpu(
        y.shape, _rows(grad_y), _rows(y), scale, grad_x.data_ptr(), torch.get_num_threads()
    )
    return grad_x


def _rows(matrix: Tensor) -> tuple[int, int, int]:
    """Address, stride and dtype; columns are contiguous."""
    return matrix.data_ptr(), matrix.stride(0), _native.DTYPES[matrix.dtype]
