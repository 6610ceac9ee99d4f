"""Exact rectangular assignment, batched and ragged."""

from detr_fast.ops.assignment.api import assignment

__all__ = ["assignment"]
