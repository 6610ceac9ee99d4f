"""Matching and losses in one pass: the set criterion."""

from detr_fast.ops.set_criterion.api import MatchedLosses, set_criterion

__all__ = ["MatchedLosses", "set_criterion"]
