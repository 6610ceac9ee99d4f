"""Attention on tokens of several images without padding."""

from detr_fast.ops.attention.api import attention
from detr_fast.ops.attention.types import TokenOffsets
from detr_fast.ops.attention.weights import attention_weights

__all__ = ["TokenOffsets", "attention", "attention_weights"]
