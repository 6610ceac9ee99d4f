"""The losses of matched masks inside the criterion, on tensors and on masks that are computed on demand."""

from __future__ import annotations

import pytest
import torch
from small import random_outputs, random_targets, small_criterion
from test_segmentation import images, small_segm
from torch import Tensor

from detr_fast import HungarianMatcher, SetCriterion
from detr_fast.ops import mask_loss


def with_masks(targets: list[dict[str, Tensor]], sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    masked = zip(targets, sizes, strict=True)
    return [{**target, "masks": torch.rand(len(target["labels"]), *size) < 0.4} for target, size in masked]


def criterion() -> SetCriterion:
    weights = {"loss_ce": 1.0, "loss_mask": 1.0, "loss_dice": 1.0}
    return SetCriterion(5, HungarianMatcher(1, 5, 2), weights, 0.1, ["labels", "masks"])


@pytest.mark.parametrize("counts", [[3, 2], [0, 4], [9, 1]])  # nine objects for seven queries, too
def test_losses_of_the_matched_pairs_divided_by_the_boxes(counts: list[int]) -> None:
    targets = with_masks(random_targets(counts), [(30, 20), (24, 36)])
    outputs = random_outputs(2) | {"pred_masks": torch.randn(2, 7, 8, 9)}
    outputs["aux_outputs"] = [random_outputs(2)]
    losses = criterion()(outputs, targets)
    pairs = HungarianMatcher(1, 5, 2)(outputs, targets)
    logits = torch.cat([outputs["pred_masks"][image][queries] for image, (queries, _) in enumerate(pairs)])
    matched = [target["masks"][found] for target, (_, found) in zip(targets, pairs, strict=True)]
    expected = mask_loss(logits, matched, backend="reference")
    torch.testing.assert_close(losses["loss_mask"], expected.mask.sum() / sum(counts))
    torch.testing.assert_close(losses["loss_dice"], expected.dice.sum() / sum(counts))
    assert "loss_ce_0" in losses and "loss_mask_0" not in losses


@pytest.mark.parametrize("counts", [[2, 1], [0, 0]])
def test_masks_on_demand_train_as_the_dense_tensor_does(counts: list[int]) -> None:
    model = small_segm().train()
    targets = with_masks(random_targets(counts), [(75, 100), (64, 50)])
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    samples, gradients = images(), []
    for lazy in (True, False):
        model.zero_grad()
        losses = criterion().double()(model(samples, lazy_masks=lazy), targets)
        (losses["loss_mask"] + losses["loss_dice"]).backward()
        gradients.append([p.grad for p in model.mask_head.parameters()])
    assert any(bool(gradient.any()) for gradient in gradients[0]) == (sum(counts) > 0)
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


def test_targets_without_masks_are_refused() -> None:
    outputs = random_outputs(2) | {"pred_masks": torch.randn(2, 7, 8, 9)}
    with pytest.raises(ValueError, match=r"masks of target 0 must be \[3, height, width\], got None"):
        criterion()(outputs, random_targets([3, 2]))
    targets = with_masks(random_targets([3, 2]), [(9, 9), (9, 9)])
    targets[1]["masks"] = targets[1]["masks"][:1]
    with pytest.raises(ValueError, match=r"masks of target 1 must be \[2, height, width\], got \[1, 9, 9\]"):
        criterion()(outputs, targets)
    assert "loss_mask" not in small_criterion()(outputs, random_targets([3, 2]))
