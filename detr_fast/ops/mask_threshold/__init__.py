"""Where upsampled masks are above a bound."""

from detr_fast.ops.mask_threshold.api import mask_threshold

__all__ = ["mask_threshold"]
