"""Convolution for inference in 8-bit integers, with bias, residual and ReLU in one pass."""

from detr_fast.ops.conv_int8.api import conv_int8, to_bytes
from detr_fast.ops.conv_int8.types import PackedConvInt8, Steps

__all__ = ["PackedConvInt8", "Steps", "conv_int8", "to_bytes"]
