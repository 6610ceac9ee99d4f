"""SetCriterion: every loss written out by hand, empty targets, and what its gradients reach."""

from __future__ import annotations

import math

import pytest
import torch
from small import random_outputs, random_targets, small_criterion, small_detr

from detr_fast import HungarianMatcher, SetCriterion
from detr_fast.ops.boxes import cxcywh_to_xyxy, elementwise_giou


def test_losses_are_the_papers_written_out() -> None:
    outputs, targets = random_outputs(2), random_targets([3, 2])
    criterion = small_criterion()
    losses = criterion(outputs, targets)

    numerator = denominator = l1 = giou = wrong = cardinality = 0.0
    for image, (queries, found) in enumerate(criterion.matcher(outputs, targets)):
        label_of_query = dict(zip(queries.tolist(), targets[image]["labels"][found].tolist(), strict=True))
        log_probability = outputs["pred_logits"][image].double().log_softmax(-1)
        for query in range(7):
            label = label_of_query.get(query, 5)
            weight = 0.1 if label == 5 else 1.0
            numerator -= weight * log_probability[query, label].item()
            denominator += weight
            wrong += label != 5 and log_probability[query].argmax().item() != label
        box, target_box = outputs["pred_boxes"][image][queries], targets[image]["boxes"][found]
        l1 += (box - target_box).abs().sum().item()
        giou += (1 - elementwise_giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(target_box))).sum().item()
        objects = (log_probability.argmax(-1) != 5).sum().item()
        cardinality += abs(objects - len(targets[image]["labels"])) / 2
    expected = {
        "loss_ce": numerator / denominator,
        "class_error": 100 * wrong / 5,
        "loss_bbox": l1 / 5,
        "loss_giou": giou / 5,
        "cardinality_error": cardinality,
    }
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)


def test_auxiliary_layers_carry_their_number() -> None:
    outputs, targets = small_detr()(torch.randn(2, 3, 32, 32)), random_targets([2, 1])
    losses = small_criterion()(outputs, targets)
    assert set(losses) == {
        *("loss_ce", "loss_bbox", "loss_giou", "cardinality_error", "class_error"),
        *(f"{name}_{i}" for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error") for i in (0, 1)),
    }
    alone = small_criterion()(outputs["aux_outputs"][1], targets)
    torch.testing.assert_close(losses["loss_giou_1"], alone["loss_giou"])
    assert all(value.ndim == 0 for value in losses.values())


@pytest.mark.parametrize("counts", [[0, 0], [0, 3], [9, 1]])
def test_empty_images_and_too_many_targets(counts: list[int]) -> None:
    model = small_detr()
    losses = small_criterion()(model(torch.randn(2, 3, 32, 32)), random_targets(counts))
    assert all(math.isfinite(value.item()) for value in losses.values())
    sum(value for name, value in losses.items() if name.startswith("loss")).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if sum(counts) == 0:
        assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
        assert losses["class_error"].item() == 100  # as in the original


def test_losses_of_bfloat16_outputs_are_float32() -> None:
    outputs, targets = random_outputs(2), random_targets([3, 2])
    halved = {key: value.bfloat16() for key, value in outputs.items()}
    losses = small_criterion()(halved, targets)
    exact = small_criterion()({key: value.float() for key, value in halved.items()}, targets)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name])


def test_the_class_of_no_object_weighs_eos_coef() -> None:
    outputs, targets = random_outputs(1), random_targets([0])
    by_weight = []
    for eos_coef in (0.1, 1.0):
        criterion = SetCriterion(5, HungarianMatcher(), {}, eos_coef, ["labels"])
        by_weight.append(criterion(outputs, targets)["loss_ce"].item())
    assert by_weight[0] == pytest.approx(by_weight[1])  # a weighted mean over one class alone


def test_refuses_an_unknown_loss() -> None:
    with pytest.raises(ValueError, match=r"losses must be among .* got \['mask'\]"):
        SetCriterion(5, HungarianMatcher(), {}, 0.1, ["labels", "mask"])


def test_targets_that_another_check_has_passed_need_not_be_checked() -> None:
    targets = random_targets([2, 1])
    targets[0]["boxes"][0] = torch.tensor([0.9, 0.5, 0.4, 0.2])  # reaches outside the image, which can be meant
    with pytest.raises(ValueError, match="reaches outside"):
        small_criterion()(random_outputs(2), targets)
    losses = small_criterion(validate=False)(random_outputs(2), targets)
    assert all(loss.isfinite() for loss in losses.values())


def test_a_matcher_of_ones_own_is_asked_for_every_layer() -> None:
    class FirstQueries(HungarianMatcher):
        calls = 0

        def forward(self, outputs: dict, targets: list) -> list:
            FirstQueries.calls += 1
            return [(torch.arange(len(t["labels"])), torch.arange(len(t["labels"]))) for t in targets]

    outputs, targets = random_outputs(2), random_targets([2, 1])
    outputs["aux_outputs"] = [random_outputs(2)]
    criterion = SetCriterion(5, FirstQueries(), {}, 0.1, ["boxes"])
    losses = criterion(outputs, targets)
    assert FirstQueries.calls == 2
    matched = torch.cat((outputs["pred_boxes"][0, :2], outputs["pred_boxes"][1, :1]))
    expected = (matched - torch.cat([target["boxes"] for target in targets])).abs().sum() / 3
    torch.testing.assert_close(losses["loss_bbox"], expected)
