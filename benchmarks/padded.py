"""The quickest way to match with packages that exist: costs padded to the largest count, one copy, then SciPy.

As release 1.11 of RF-DETR does it: all layers stacked, each image against its own targets only, one copy to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.original import Matches, corners, giou_of_all_pairs


def match_layers(layers: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> list[Matches]:
    """Match every decoder layer, with the paper's weights (class 1, L1 5, GIoU 2)."""
    cost = padded_cost(layers, targets).cpu().numpy()
    counts = [len(target["boxes"]) for target in targets]
    return [
        [as_tensors(linear_sum_assignment(image[:, :count])) for image, count in zip(layer, counts, strict=True)]
        for layer in cost
    ]


def as_tensors(pairs: tuple) -> tuple[Tensor, Tensor]:
    """SciPy's rows and columns as tensors."""
    return torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])


def padded_cost(layers: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> Tensor:
    """[L, B, Q, T] for the largest count T of the batch; behind an image's own targets stands padding."""
    probabilities = torch.stack([outputs["pred_logits"] for outputs in layers]).softmax(-1)  # [L, B, Q, C + 1]
    boxes = torch.stack([outputs["pred_boxes"] for outputs in layers])  # [L, B, Q, 4]
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)  # [B, T]
    target_boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)  # [B, T, 4]

    cost_class = probabilities.gather(-1, labels[:, None].expand(*boxes.shape[:3], -1))
    cost_bbox = torch.cdist(boxes, target_boxes.expand(len(layers), -1, -1, -1), p=1)
    return 5 * cost_bbox - cost_class - 2 * giou_of_all_pairs(corners(boxes), corners(target_boxes))
