"""The bipartite matching: cost and assignment in one pass."""

from detr_fast.ops.matching.api import Matching, matching

__all__ = ["Matching", "matching"]
