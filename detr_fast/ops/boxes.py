"""Box formats, IoU and generalized IoU.

Bare ``boxes`` are cxcywh (centre, width, height), as fractions of the image; ``boxes_xyxy`` are corners in any unit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to top left and bottom right corner; [..., 4] to [..., 4], in the same unit."""
    cx, cy, w, h = _columns(boxes, "boxes")
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Corners to centre and size; [..., 4] to [..., 4], in the same unit."""
    x0, y0, x1, y1 = _columns(boxes_xyxy, "boxes_xyxy")
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """[..., 4] corners to [...] areas; negative where one side, and only one, is negative."""
    x0, y0, x1, y1 = _columns(boxes_xyxy, "boxes_xyxy")
    return (x1 - x0) * (y1 - y0)


def elementwise_iou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Intersection over union of box i with other i.

    Args:
        boxes_xyxy, other_xyxy: [..., 4] corners with x0 <= x1 and y0 <= y1, shapes that broadcast.

    Returns:
        [...] in [0, 1]; 0 where both boxes have no area.
    """
    intersection, union = _intersection_and_union(boxes_xyxy, other_xyxy)
    return _ratio(intersection, union)


def elementwise_giou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Generalized IoU of box i with other i (Rezatofighi et al. 2019, equation 1).

    GIoU = IoU - (area of the smallest box around both - union) / area of the smallest box around both.

    Args:
        boxes_xyxy, other_xyxy: [..., 4] corners with x0 <= x1 and y0 <= y1, shapes that broadcast.

    Returns:
        [...] in [-1, 1]; 0 where both boxes are the same point.
    """
    intersection, union = _intersection_and_union(boxes_xyxy, other_xyxy)
    low = torch.minimum(boxes_xyxy[..., :2], other_xyxy[..., :2])
    high = torch.maximum(boxes_xyxy[..., 2:], other_xyxy[..., 2:])
    enclosing = _area_of_sides(high - low)
    return _ratio(intersection, union) - _ratio(enclosing - union, enclosing)


def pairwise_iou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """IoU of every box with every other: [..., N, 4] and [..., M, 4] to [..., N, M]."""
    return elementwise_iou(boxes_xyxy[..., :, None, :], other_xyxy[..., None, :, :])


def pairwise_giou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Generalized IoU of every box with every other: [..., N, 4] and [..., M, 4] to [..., N, M]."""
    return elementwise_giou(boxes_xyxy[..., :, None, :], other_xyxy[..., None, :, :])


def _columns(boxes: Tensor, name: str) -> tuple[Tensor, ...]:
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"{name} must be [..., 4], got {list(boxes.shape)}")
    return boxes.unbind(-1)


def _intersection_and_union(boxes_xyxy: Tensor, other_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(boxes_xyxy[..., :2], other_xyxy[..., :2])
    high = torch.minimum(boxes_xyxy[..., 2:], other_xyxy[..., 2:])
    intersection = _area_of_sides(high - low)
    return intersection, box_area(boxes_xyxy) + box_area(other_xyxy) - intersection


def _area_of_sides(sides: Tensor) -> Tensor:
    w, h = sides.clamp(min=0).unbind(-1)  # not prod: its gradient treats zeros apart, in several passes
    return w * h


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # The smallest positive number stands in for a zero area: 0 / 0 becomes 0, every other value and gradient stays.
    return numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny)
