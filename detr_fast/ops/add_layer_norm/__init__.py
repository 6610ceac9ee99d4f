"""Residual, dropout, layer norm and the position that is added to its result, in one pass."""

from detr_fast.ops.add_layer_norm.api import add_layer_norm

__all__ = ["add_layer_norm"]
