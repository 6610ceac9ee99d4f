"""What the implementations of ``add_layer_norm`` are given and give back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.ops.dropout import Dropout


class Inputs(NamedTuple):
    """The checked arguments of a call as matrices.

    Attributes:
        x, residual: [N, D] of any strides.
        weight: [D].
        dropout: None where nothing is dropped.
    """

    x: Tensor
    residual: Tensor
    weight: Tensor
    dropout: Dropout | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return torch.promote_types(self.x.dtype, self.residual.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of statistics, and of all that is between inputs and results."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def one_gradient(self) -> bool:
        """Whether the gradients of x and residual are the same tensor."""
        return self.dropout is None and self.x.dtype == self.residual.dtype


class Normalized(NamedTuple):
    """The result.

    Attributes:
        y: [N, D].
        y_pos: [N, D], or None where there is no position.
        mean, rstd: [N] of the rows' sums, in ``compute_dtype``: what the backward needs besides the inputs.
    """

    y: Tensor
    y_pos: Tensor | None
    mean: Tensor
    rstd: Tensor


class Gradients(NamedTuple):
    """Of the inputs: x and residual [N, D] (x None where ``one_gradient``), weight and bias [D]."""

    x: Tensor | None
    residual: Tensor
    weight: Tensor
    bias: Tensor
