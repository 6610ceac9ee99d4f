"""Class + L1 + GIoU cost of every target against the queries of its own image."""

from detr_fast.ops.matching_cost.api import MatchingCost, matching_cost
from detr_fast.ops.matching_cost.types import CostWeights, PackedTargets, PaddedTargets

__all__ = ["CostWeights", "MatchingCost", "PackedTargets", "PaddedTargets", "matching_cost"]
