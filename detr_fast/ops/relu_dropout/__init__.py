"""ReLU and dropout in one pass, as between the two layers of a feed-forward network."""

from detr_fast.ops.relu_dropout.api import relu_dropout

__all__ = ["relu_dropout"]
