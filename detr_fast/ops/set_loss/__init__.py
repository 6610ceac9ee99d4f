"""The losses of matched predictions, of all decoder layers and images at once, with their gradients."""

from detr_fast.ops.set_loss.api import set_loss
from detr_fast.ops.set_loss.types import ClassLoss, CrossEntropy, Focal, SetLosses, Varifocal

__all__ = ["ClassLoss", "CrossEntropy", "Focal", "SetLosses", "Varifocal", "set_loss"]
