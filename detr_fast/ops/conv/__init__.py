"""Convolution for inference, with bias, residual and ReLU in one pass."""

from detr_fast.ops.conv.api import conv, pack_conv
from detr_fast.ops.conv.types import PackedConv

__all__ = ["PackedConv", "conv", "pack_conv"]
