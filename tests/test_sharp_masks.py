"""Sharpened masks: better where outlines are edges of the image, unchanged where a mask is certain."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from stand_ins import noise
from test_predict_panoptic import halves
from torch import Tensor

from detr_fast.sharp_masks import (
    CERTAIN,
    COLOR_SPREAD,
    PLACE_SPREAD,
    PLAIN_SHARE,
    REACH,
    SharpMasks,
    sharpen_masks,
    with_sharp_masks,
)


def disks(count: int = 3, side: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Masks [K, side, side] of disks, their blurred logits at a quarter of the size, an image of one colour a disk."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image, masks = 0.05 * torch.randn(3, side, side), []
    for k in range(count):
        inside = (y - 16 - 14 * k) ** 2 + (x - 12 - 18 * k) ** 2 < (5 + torch.rand(()).item() * 4) ** 2
        image[:, inside] += torch.tensor([1.5, -1.0, 0.5]).roll(k)[:, None]
        masks.append(inside)
    truth = torch.stack(masks)
    coverage = F.avg_pool2d(F.avg_pool2d(truth[None].float(), 4), 3, 1, 1)[0]
    return truth, torch.logit(coverage.clamp(0.02, 0.98)), image


def iou(masks: Tensor, truth: Tensor) -> Tensor:
    return (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))


def test_outlines_that_are_edges_become_sharper() -> None:
    truth, logits, image = disks()
    plain = F.interpolate(logits[None], (64, 64), mode="bilinear")[0]
    sharp = sharpen_masks(logits, image)
    assert (iou(sharp > 0, truth) > iou(plain > 0, truth)).all()
    assert iou(sharp > 0, truth).mean() > iou(plain > 0, truth).mean() + 0.03


def test_what_is_certain_stays_and_the_rest_is_the_formula() -> None:
    _, logits, image = disks(2)
    plain = F.interpolate(logits[None], (64, 64), mode="bilinear")[0]
    sharp, lean = sharpen_masks(logits, image), torch.tanh(plain / 2)
    certain = lean.abs() >= CERTAIN
    assert 0.2 < certain.float().mean() < 0.98 and torch.equal(sharp[certain], plain[certain])
    low, colors = torch.tanh(logits / 2), F.avg_pool2d(image, 4)
    places = (~certain).nonzero()
    for k, row, column in places[torch.randperm(len(places))[:16]].tolist():
        y, x = (row + 0.5) / 4 - 0.5, (column + 0.5) / 4 - 0.5
        above = below = 0.0
        for dy in range(-REACH, REACH + 1):
            for dx in range(-REACH, REACH + 1):
                i, j = min(max(round(y) + dy, 0), 15), min(max(round(x) + dx, 0), 15)
                unlike = (image[:, row, column] - colors[:, i, j]).square().sum().item() / COLOR_SPREAD**2
                far = ((y - i) ** 2 + (x - j) ** 2) / PLACE_SPREAD**2
                value = low[k, i, j].item()
                weight = math.exp(-(unlike + far) / 2) * abs(value)
                above, below = above + weight * value, below + weight
        expected = PLAIN_SHARE * lean[k, row, column].item() + (1 - PLAIN_SHARE) * above / max(below, 1e-6)
        assert math.tanh(sharp[k, row, column].item() / 2) == pytest.approx(expected, abs=1e-4)


def test_of_some_queries_of_some_images() -> None:
    images, masks = torch.randn(2, 3, 20, 28), 3 * torch.randn(2, 4, 5, 7)  # here certain, there not
    sharp = with_sharp_masks({"pred_masks": masks, "pred_logits": 1}, images)["pred_masks"]
    dense = sharp.dense()
    assert dense.shape == sharp.shape == (2, 4, 20, 28)
    chosen = torch.tensor([1, 0, 1]), torch.tensor([2, 3, 0])
    torch.testing.assert_close(sharp[chosen], dense[chosen])
    torch.testing.assert_close(dense[1, 2], sharpen_masks(masks[1, 2:3], images[1])[0])
    none = torch.zeros(0, dtype=torch.int64)
    assert SharpMasks(masks, images)[none, none].shape == (0, 20, 28)


def test_bad_input_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"masks and image must be \[K, h, w\] and \[3, H, W\], got \[4, 5\], \[3, 8, 8\]"
    ):
        sharpen_masks(torch.zeros(4, 5), torch.zeros(3, 8, 8))


def test_a_predictor_uses_them_when_told() -> None:
    picture = noise(60, 40)
    (plain,), (sharp,) = (halves(sharp_masks=sharp).panoptic(picture) for sharp in (False, True))
    assert [info["category_id"] for info in sharp.segments_info] == [3, 1]
    # The outline wanders with the noise, but no further than the logits reach.
    assert 0 < (plain.ids != sharp.ids).float().mean() < 0.3
