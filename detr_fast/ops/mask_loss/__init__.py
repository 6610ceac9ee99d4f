"""The focal and the dice loss of masks."""

from detr_fast.ops.mask_loss.api import MaskLosses, mask_loss

__all__ = ["MaskLosses", "mask_loss"]
