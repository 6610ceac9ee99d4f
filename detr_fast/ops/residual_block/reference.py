"""A residual block in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.residual_block.types import FrozenConv


def residual_block_reference(x: Tensor, layers: Sequence[FrozenConv], shortcut: FrozenConv | None) -> Tensor:
    y = x
    for layer in layers[:-1]:
        y = F.relu_(layer(y))
    return F.relu_(layers[-1](y).add_(x if shortcut is None else shortcut(x)))
