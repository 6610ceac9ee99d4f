"""A block of a residual network whose norms are frozen, in training too."""

from detr_fast.ops.residual_block.api import residual_block
from detr_fast.ops.residual_block.types import FrozenConv

__all__ = ["FrozenConv", "residual_block"]
