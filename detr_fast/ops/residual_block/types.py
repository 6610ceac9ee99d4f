"""What ``residual_block`` takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.conv.types import out_size


class FrozenConv(NamedTuple):
    """A convolution without a bias, and a norm after it that never changes: a factor and a summand of each channel.

    Attributes:
        weight: [K, C, R, S], which may be trained.
        scale, shift: [K], which may not.
        stride, padding, dilation: the same in both directions.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def shape(self) -> torch.Size:
        """(K, C, R, S)."""
        return self.weight.shape

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result for a map of these."""
        return out_size(self, height, width)

    def scaled(self) -> Tensor:
        """The weight with the norm's factor in it: [K, C, R, S], which is small beside a map."""
        return self.weight * self.scale[:, None, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, K, H', W']."""
        return F.conv2d(x, self.scaled(), self.shift, self.stride, self.padding, self.dilation)
