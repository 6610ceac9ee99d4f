"""ReLU and dropout in plain PyTorch, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops.dropout import Dropout, keep_mask


def relu_dropout_reference(x: Tensor, dropout: Dropout, overwrite: bool = False) -> Tensor:
    y = torch.where(keep_mask(dropout, *x.shape), _wide(x).relu() * dropout.scale, 0).to(x.dtype)  # [N, D]
    return x.copy_(y) if overwrite else y


def relu_dropout_reference_backward(grad_y: Tensor, y: Tensor, scale: float) -> Tensor:
    return torch.where(y > 0, _wide(grad_y) * scale, 0).to(grad_y.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
