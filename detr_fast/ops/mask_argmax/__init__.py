"""Which of several upsampled masks is the highest at each pixel."""

from detr_fast.ops.mask_argmax.api import mask_argmax
from detr_fast.ops.mask_argmax.types import Places

__all__ = ["Places", "mask_argmax"]
