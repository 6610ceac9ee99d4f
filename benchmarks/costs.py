"""Assignment problems [T, Q] float32 as DETR's matching has them, and harder ones."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.original import corners, giou_of_all_pairs


def trained(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """Each target has a query of its own nearby that knows its class; the others are anywhere and sure of none."""
    target_boxes = boxes(targets, generator)
    query_boxes = boxes(queries, generator)
    own = torch.randperm(queries, generator=generator)[:targets]
    query_boxes[own] = target_boxes + 0.01 * torch.randn(targets, 4, generator=generator)
    probabilities = 0.05 * torch.rand(targets, queries, generator=generator)
    probabilities[torch.arange(targets), own] = 0.5 + 0.5 * torch.rand(targets, generator=generator)
    return cost_of(target_boxes, query_boxes, probabilities)


def untrained(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """All queries say nearly the same, a box in the middle and no class: the first hundreds of steps."""
    query_boxes = 0.5 + 0.01 * torch.randn(queries, 4, generator=generator)
    probabilities = (1 + 0.1 * torch.randn(targets, queries, generator=generator)) / 92
    return cost_of(boxes(targets, generator), query_boxes, probabilities)


def alike(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """A number of the target plus a number of the query plus a hundredth of noise, all uniform."""
    of_target, of_query = torch.rand(targets, 1, generator=generator), torch.rand(1, queries, generator=generator)
    return of_target + of_query + 0.01 * torch.rand(targets, queries, generator=generator)


def uniform(targets: int, queries: int, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(targets, queries, generator=generator)


def boxes(number: int, generator: torch.Generator) -> Tensor:
    """[N, 4] cxcywh within the image, mostly small."""
    size = 0.02 + 0.5 * torch.rand(number, 2, generator=generator) ** 2
    return torch.cat([size / 2 + (1 - size) * torch.rand(number, 2, generator=generator), size], -1)


def cost_of(target_boxes: Tensor, query_boxes: Tensor, probabilities: Tensor) -> Tensor:
    """[T, Q]: the matching cost with the paper's weights."""
    giou = giou_of_all_pairs(corners(target_boxes), corners(query_boxes))
    return 5 * torch.cdist(target_boxes, query_boxes, p=1) - probabilities - 2 * giou
