"""A convolution, ReLU and max-pooling in one pass: the stem of a ResNet."""

from detr_fast.ops.conv_max_pool.api import conv_max_pool

__all__ = ["conv_max_pool"]
