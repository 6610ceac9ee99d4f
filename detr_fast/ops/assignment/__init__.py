"""Exact rectangular assignment, batched and ragged."""

from detr_fast.ops.assignment.api import assignment, solve_assignment
from detr_fast.ops.assignment.report import AssignmentOutcome, AssignmentReport

__all__ = ["AssignmentOutcome", "AssignmentReport", "assignment", "solve_assignment"]
