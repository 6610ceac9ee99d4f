"""Layer norm of a residual sum in plain PyTorch (Ba, Kiros and Hinton 2016, section 3), and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops.add_layer_norm.types import Gradients, Inputs, Normalized
from detr_fast.ops.dropout import Dropout, keep_mask


def add_layer_norm_reference(inputs: Inputs, bias: Tensor, pos: Tensor | None, eps: float) -> Normalized:
    total = _sum(inputs)  # [N, D]
    mean = total.mean(-1, keepdim=True)
    rstd = ((total - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (total - mean) * rstd * inputs.weight + bias
    y_pos = None if pos is None else (y + pos.repeat(len(y) // max(1, len(pos)), 1)).to(inputs.dtype)
    return Normalized(y.to(inputs.dtype), y_pos, mean.squeeze(-1), rstd.squeeze(-1))


def add_layer_norm_reference_backward(
    inputs: Inputs, mean: Tensor, rstd: Tensor, grad_y: Tensor | None, grad_y_pos: Tensor | None
) -> Gradients:
    grad = torch.stack([g.to(mean.dtype) for g in (grad_y, grad_y_pos) if g is not None]).sum(0)  # [N, D]
    normal = (_sum(inputs) - mean[:, None]) * rstd[:, None]
    inner = grad * inputs.weight
    along_normal = (inner * normal).mean(-1, keepdim=True)
    grad_sum = (inner - inner.mean(-1, keepdim=True) - normal * along_normal) * rstd[:, None]
    grad_x = None if inputs.one_gradient else _dropped(grad_sum, inputs.dropout).to(inputs.x.dtype)
    grad_weight, grad_bias = (grad * normal).sum(0), grad.sum(0)
    weight_dtype = inputs.weight.dtype
    return Gradients(
        grad_x, grad_sum.to(inputs.residual.dtype), grad_weight.to(weight_dtype), grad_bias.to(weight_dtype)
    )


def _sum(inputs: Inputs) -> Tensor:
    return inputs.residual + _dropped(inputs.x.to(inputs.compute_dtype), inputs.dropout)


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    return torch.where(keep_mask(dropout, *x.shape), x * dropout.scale, 0)
