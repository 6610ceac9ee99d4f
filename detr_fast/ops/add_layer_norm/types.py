"""What the implementations of ``add_layer_norm`` are given and give back."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.ops.dropout import Dropout


@cache
def promoted(*dtypes: torch.dtype) -> torch.dtype:
    """``torch.promote_types``, kept: on the CPU a call of the op takes no longer than some twenty of these."""
    return torch.promote_types(*dtypes)


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
        return promoted(self.x.dtype, self.residual.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of statistics, and of all that is between inputs and results."""
        return promoted(self.dtype, torch.float32)

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
