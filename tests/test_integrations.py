"""The adapters against the matchers whose place they take: transformers' own, and the others' formulas written out."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from small import random_boxes, random_targets
from torch import Tensor, nn

from detr_fast.integrations import d_fine, rf_detr, rt_detr
from detr_fast.integrations import transformers as ours

NUM_CLASSES = 6
# Targets of the images of a batch, for 13 queries: none in one image, none at all, as many as queries, and more.
COUNTS = [(3,), (0, 4), (0, 0), (13, 2), (20, 1, 5)]
WEIGHTS = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 1.5}


def predictions(batch: int, num_queries: int = 13) -> dict[str, Tensor]:
    """In float64, in which rounding does not change the best matching; logits are a slice of wider ones."""
    boxes = torch.stack([random_boxes(num_queries) for _ in range(batch)])
    logits = 3 * torch.randn(batch, num_queries, NUM_CLASSES + 1, dtype=torch.float64)
    return {"pred_logits": logits[..., :-1], "pred_boxes": on_a_grid(boxes)}


def targets_for(counts: Sequence[int]) -> list[dict[str, Tensor]]:
    targets = random_targets(list(counts), NUM_CLASSES)
    return [{"labels": target["labels"], "boxes": on_a_grid(target["boxes"])} for target in targets]


def on_a_grid(boxes: Tensor) -> Tensor:
    """Boxes whose L1 distance is exact in float32, in which some libraries compute it always."""
    return (boxes.double() * 1024).round() / 1024


def theirs_named(values: Any, names: dict[str, str]) -> Any:
    """The dict or each dict of a list with other names, where they have others."""
    if isinstance(values, dict):
        return {names.get(name, name): value for name, value in values.items()}
    return [theirs_named(value, names) for value in values]


def assert_same_pairs(found: Sequence[tuple[Tensor, Tensor]], expected: Sequence[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(expected)
    for (queries, targets), (expected_queries, expected_targets) in zip(found, expected, strict=True):
        assert queries.dtype == targets.dtype == torch.int64
        assert queries.device.type == targets.device.type == "cpu"
        assert queries.tolist() == expected_queries.tolist()
        assert targets.tolist() == expected_targets.tolist()


def written_out(
    outputs: dict[str, Tensor],
    targets: list[dict[str, Tensor]],
    class_term: Callable[[Tensor], Tensor],
    *,
    clamped: bool = False,
    groups: int = 1,
) -> list[tuple[Tensor, Tensor]]:
    """The matching by SciPy, image by image, of costs in float64; ``class_term`` is of logits [Q, classes]."""
    pairs = []
    for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
        wanted = target["boxes"].double()[None]  # [1, T, 4]
        boxes = boxes.double()[:, None]  # [Q, 1, 4]
        cost = WEIGHTS["cost_class"] * class_term(logits.double())[:, target["labels"]]
        cost = (
            cost
            + WEIGHTS["cost_bbox"] * (boxes - wanted).abs().sum(-1)
            - WEIGHTS["cost_giou"]
            * giou(torch.cat((boxes[..., :2], boxes[..., 2:].clamp(min=0)), -1) if clamped else boxes, wanted)
        )
        size = len(cost) // groups
        found = [linear_sum_assignment(cost[g * size : (g + 1) * size].numpy()) for g in range(groups)]
        queries = torch.cat([torch.as_tensor(q) + g * size for g, (q, _) in enumerate(found)])
        pairs.append((queries, torch.cat([torch.as_tensor(t) for _, t in found])))
    return pairs


def giou(a: Tensor, b: Tensor) -> Tensor:
    low_a, high_a = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    low_b, high_b = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    inner = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    outer = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inner
    return inner / union - (outer - union) / outer


def softmax_term(logits: Tensor) -> Tensor:
    return -logits.softmax(-1)


def focal_term(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0, constant: float = 1e-8) -> Tensor:
    p, q = logits.sigmoid(), (-logits).sigmoid()
    return -alpha * q**gamma * (p + constant).log() + (1 - alpha) * p**gamma * (q + constant).log()


def test_nothing_is_imported_that_was_not_asked_for() -> None:
    code = "import sys, detr_fast; print([name for name in sys.modules if name.startswith('detr_fast.integrations')]);"
    code += "import detr_fast.integrations.transformers; print('transformers' in sys.modules)"
    folder = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "False"]


# transformers


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    return pytest.importorskip("transformers", reason="the test extra has transformers")


def their_matcher(name: str) -> type[nn.Module]:
    modules = {"HungarianMatcher": "for_object_detection", "DeformableDetrHungarianMatcher": "deformable_detr"}
    modules |= {"LwDetrHungarianMatcher": "lw_detr", "RTDetrHungarianMatcher": "rt_detr"}
    return getattr(importlib.import_module(f"transformers.loss.loss_{modules[name]}"), name)


def hf_predictions(batch: int) -> dict[str, Tensor]:
    return theirs_named(predictions(batch), {"pred_logits": "logits"})


def hf_targets(counts: Sequence[int]) -> list[dict[str, Tensor]]:
    return theirs_named(targets_for(counts), {"labels": "class_labels"})


def rt_detr_config(**options) -> SimpleNamespace:
    costs = {"matcher_class_cost": 2.0, "matcher_bbox_cost": 5.0, "matcher_giou_cost": 1.5}
    return SimpleNamespace(**{**costs, "use_focal_loss": True, "matcher_alpha": 0.4, "matcher_gamma": 1.5, **options})


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", ["HungarianMatcher", "DeformableDetrHungarianMatcher"])
def test_transformers_detr_and_deformable_detr(hf: ModuleType, name: str, counts: tuple[int, ...]) -> None:
    outputs, targets = hf_predictions(len(counts)), hf_targets(counts)
    theirs = their_matcher(name)(class_cost=2, bbox_cost=5, giou_cost=1.5)
    found = getattr(ours, name)(class_cost=2, bbox_cost=5, giou_cost=1.5)(outputs, targets)
    assert_same_pairs(found, theirs(outputs, targets))
    assert_same_pairs(getattr(ours, name).like(theirs)(outputs, targets), found)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("use_focal_loss", [True, False])
def test_transformers_rt_detr(hf: ModuleType, use_focal_loss: bool, counts: tuple[int, ...]) -> None:
    outputs, targets = hf_predictions(len(counts)), hf_targets(counts)
    config = rt_detr_config(use_focal_loss=use_focal_loss)
    theirs = their_matcher("RTDetrHungarianMatcher")(config)
    found = ours.RTDetrHungarianMatcher(config)(outputs, targets)
    assert_same_pairs(found, theirs(outputs, targets))
    assert_same_pairs(ours.RTDetrHungarianMatcher.like(theirs)(outputs, targets), found)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("group_detr", [1, 3, 13])
def test_transformers_lw_detr(hf: ModuleType, group_detr: int, counts: tuple[int, ...]) -> None:
    """13 queries in 3 groups: the last one belongs to none."""
    outputs, targets = hf_predictions(len(counts)), hf_targets(counts)
    expected = their_matcher("LwDetrHungarianMatcher")(2, 5, 1.5)(outputs, targets, group_detr)
    assert_same_pairs(ours.LwDetrHungarianMatcher(2, 5, 1.5)(outputs, targets, group_detr=group_detr), expected)


def test_transformers_costs_that_are_no_numbers(hf: ModuleType) -> None:
    """Both leave those queries for the last, and match as many pairs."""
    outputs, targets = hf_predictions(2), hf_targets((13, 4))
    outputs["logits"][:, 2:9] = float("nan")
    expected = their_matcher("HungarianMatcher")(2, 5, 1.5)(outputs, targets)
    found = ours.HungarianMatcher(2, 5, 1.5)(outputs, targets)
    assert [len(queries) for queries, _ in found] == [13, 4]
    assert [queries.tolist() for queries, _ in found] == [queries.tolist() for queries, _ in expected]


def hf_labels(counts: Sequence[int]) -> list[dict[str, Tensor]]:
    return [{**target, "boxes": target["boxes"].float()} for target in hf_targets(counts)]


def tiny_detr(hf: ModuleType, **options) -> nn.Module:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 9}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"use_timm_backbone": False, "num_labels": NUM_CLASSES, "dropout": 0.0}
    return hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=backbone, **sizes, **options))


class Counted:
    """Counts the calls of a matcher's class."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
        self.calls = 0
        forward = kind.forward

        def counting(matcher: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return forward(matcher, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counting)


@pytest.mark.parametrize("auxiliary_loss", [False, True])
def test_a_detr_of_transformers_with_our_matcher(hf: ModuleType, monkeypatch, auxiliary_loss: bool) -> None:
    theirs = tiny_detr(hf, auxiliary_loss=auxiliary_loss)
    with torch.no_grad():  # or all queries are so alike that rounding decides which of them is matched
        theirs.model.query_position_embeddings.weight.normal_(std=5)
        for parameter in theirs.bbox_predictor.parameters():
            parameter.mul_(5)
    images, labels = torch.randn(2, 3, 64, 96), hf_labels((4, 0))
    expected = theirs(pixel_values=images, labels=labels)
    model = ours.use_in(copy.deepcopy(theirs))
    assert model.config.class_cost == theirs.config.class_cost

    their_calls = Counted(monkeypatch, their_matcher("HungarianMatcher"))
    our_calls = Counted(monkeypatch, ours.HungarianMatcher)
    result = model(pixel_values=images, labels=labels)
    assert (their_calls.calls, our_calls.calls) == (0, 1 + auxiliary_loss)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.loss_dict, expected.loss_dict)
    gradients = [
        torch.autograd.grad(out.loss, net.class_labels_classifier.weight)[0]
        for out, net in ((result, model), (expected, theirs))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[0].abs().max().item())

    theirs(pixel_values=images, labels=labels)
    assert (their_calls.calls, our_calls.calls) == (1 + auxiliary_loss, 1 + auxiliary_loss), "the other model changed"


def test_a_model_with_our_matcher_can_be_copied_and_pickled(hf: ModuleType, monkeypatch) -> None:
    model = ours.use_in(tiny_detr(hf))
    assert ours.use_in(model).loss_function is model.loss_function
    images, labels = torch.randn(1, 3, 64, 64), hf_labels((3,))
    expected = model(pixel_values=images, labels=labels).loss
    our_calls = Counted(monkeypatch, ours.HungarianMatcher)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(pixel_values=images, labels=labels).loss, expected)
    assert our_calls.calls == 2


# A model's class in transformers, and the matcher that its loss uses.
LOSSES = {
    "ConditionalDetr": "DeformableDetrHungarianMatcher",
    "DeformableDetr": "DeformableDetrHungarianMatcher",
    "RTDetr": "RTDetrHungarianMatcher",
    "RTDetrV2": "RTDetrHungarianMatcher",
    "DFine": "RTDetrHungarianMatcher",
    "LwDetr": "LwDetrHungarianMatcher",
}


def loss_function(model: str) -> Callable[..., Any]:
    return importlib.import_module("transformers.loss.loss_utils").LOSS_MAPPING[f"{model}ForObjectDetection"]


@pytest.mark.parametrize(("model", "matcher"), LOSSES.items())
def test_loss_functions_of_transformers_with_our_matcher(hf: ModuleType, monkeypatch, model: str, matcher: str) -> None:
    config = getattr(hf, f"{model}Config")(num_labels=NUM_CLASSES, auxiliary_loss=False)
    outputs, targets = hf_predictions(3), hf_targets((4, 0, 2))
    arguments = {"labels": targets, "device": torch.device("cpu"), "config": config, **outputs}
    if model == "LwDetr":
        outputs = theirs_named(hf_predictions(3), {"logits": "enc_outputs_class", "pred_boxes": "enc_outputs_coord"})
        arguments |= outputs
    theirs = loss_function(model)
    loss, losses, _ = theirs(**arguments)

    their_calls = Counted(monkeypatch, their_matcher(matcher))
    our_calls = Counted(monkeypatch, ours.MATCHERS[matcher])
    found, found_losses, _ = ours.LossFunction(theirs)(**arguments)
    assert their_calls.calls == 0
    assert our_calls.calls == (2 if model == "LwDetr" else 1)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(found_losses, losses)


def test_a_criterion_of_transformers(hf: ModuleType) -> None:
    config = hf.RTDetrConfig(matcher_class_cost=3.0, matcher_gamma=1.0)
    criterion = importlib.import_module("transformers.loss.loss_rt_detr").RTDetrLoss(config)
    assert ours.use_in(criterion) is criterion
    matcher = criterion.matcher
    assert type(matcher) is ours.RTDetrHungarianMatcher
    assert (matcher.class_cost, matcher.gamma, matcher.use_focal_loss) == (3.0, 1.0, True)
    assert type(ours.use_in(criterion).matcher) is ours.RTDetrHungarianMatcher


def test_what_cannot_be_replaced_is_named(hf: ModuleType) -> None:
    losses = importlib.import_module("transformers.loss.loss_utils").LOSS_MAPPING
    masks = importlib.import_module("transformers.loss.loss_rf_detr").RfDetrHungarianMatcher()
    with pytest.raises(NotImplementedError, match="no matcher here for the cost of RfDetrHungarianMatcher"):
        ours.use_in(SimpleNamespace(matcher=masks))
    with pytest.raises(NotImplementedError, match="ForCausalLMLoss makes no criterion"):
        ours.use_in(SimpleNamespace(loss_function=losses["ForCausalLM"]))
    with pytest.raises(TypeError, match="must have a matcher or a loss_function, got Linear"):
        ours.use_in(nn.Linear(1, 1))


# The repositories of RT-DETR, D-FINE and RF-DETR.


def matcher_attributes(**values) -> SimpleNamespace:
    """What a matcher of those repositories has been given, kept under the same names."""
    return SimpleNamespace(**WEIGHTS, **values)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("use_focal_loss", [True, False])
def test_rt_detr_and_d_fine(use_focal_loss: bool, counts: tuple[int, ...]) -> None:
    outputs, targets = predictions(len(counts)), targets_for(counts)
    term = (lambda logits: focal_term(logits, 0.4, 1.5)) if use_focal_loss else softmax_term
    expected = written_out(outputs, targets, term)
    options = {"use_focal_loss": use_focal_loss, "alpha": 0.4, "gamma": 1.5}
    assert_same_pairs(rt_detr.HungarianMatcher(WEIGHTS, **options)(outputs, targets), expected)
    assert_same_pairs(rt_detr.HungarianMatcherV2(WEIGHTS, **options)(outputs, targets)["indices"], expected)
    assert_same_pairs(d_fine.HungarianMatcher(WEIGHTS, **options)(outputs, targets)["indices"], expected)
    swapped = d_fine.HungarianMatcher.like(matcher_attributes(**options))
    assert_same_pairs(swapped(outputs, targets)["indices"], expected)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("group_detr", [1, 3, 13])
def test_rf_detr(group_detr: int, counts: tuple[int, ...]) -> None:
    outputs, targets = predictions(len(counts)), targets_for(counts)
    expected = written_out(outputs, targets, lambda x: focal_term(x, constant=0), groups=group_detr)
    assert_same_pairs(rf_detr.HungarianMatcher(**WEIGHTS)(outputs, targets, group_detr=group_detr), expected)
    theirs = matcher_attributes(focal_alpha=0.25, mask_point_sample_ratio=16, cost_mask_ce=1, cost_mask_dice=1)
    assert_same_pairs(rf_detr.HungarianMatcher.like(theirs)(outputs, targets, group_detr), expected)


def test_rf_detr_tells_very_unlikely_classes_apart() -> None:
    """In float32 a constant of 1e-8 hides probabilities below 1e-16; RF-DETR's formula has none."""
    outputs, targets = predictions(1), targets_for([4])
    targets[0]["labels"] = torch.randperm(NUM_CLASSES)[:4]
    outputs["pred_boxes"] = outputs["pred_boxes"][:, :1].expand(1, 13, 4)
    outputs["pred_logits"] = -40 - 40 * torch.rand(1, 13, NUM_CLASSES)
    expected = written_out(outputs, targets, lambda x: focal_term(x, constant=0))
    assert_same_pairs(rf_detr.HungarianMatcher(**WEIGHTS)(outputs, targets), expected)
    # focal_alpha is without effect there too.
    assert_same_pairs(rf_detr.HungarianMatcher(**WEIGHTS, focal_alpha=0.9)(outputs, targets), expected)
    with_constant = rt_detr.HungarianMatcher(WEIGHTS, use_focal_loss=True)(outputs, targets)
    assert any(a.tolist() != b.tolist() for a, b in zip(with_constant[0], expected[0], strict=True))


def test_negative_sizes_count_as_none_for_giou_and_as_they_are_for_l1() -> None:
    outputs, targets = predictions(2, 40), targets_for([12, 9])
    negative = torch.rand(2, 40, 2) < 0.5
    outputs["pred_boxes"][..., 2:] *= torch.where(negative, -0.2, 1.0)
    expected = written_out(outputs, targets, focal_term, clamped=True)
    assert_same_pairs(d_fine.HungarianMatcher(WEIGHTS, use_focal_loss=True)(outputs, targets)["indices"], expected)
    assert_same_pairs(rf_detr.HungarianMatcher(**WEIGHTS)(outputs, targets), expected)
    used = torch.stack([negative[image, queries].any() for image, (queries, _) in enumerate(expected)])
    assert used.any(), "no such box was matched, so the test says nothing"


def test_empty_targets_of_any_shape_and_labels_of_any_integer() -> None:
    outputs, (target, _) = predictions(2), targets_for([3, 0])
    expected = rt_detr.HungarianMatcher(WEIGHTS)(outputs, [target, {"labels": torch.empty(0), "boxes": torch.empty(0)}])
    assert [len(queries) for queries, _ in expected] == [3, 0]
    narrow = {"labels": target["labels"].int(), "boxes": target["boxes"].double()}
    empty = {"labels": torch.empty(0, dtype=torch.int64), "boxes": torch.empty(0, 4)}
    assert_same_pairs(rt_detr.HungarianMatcher(WEIGHTS)(outputs, [narrow, empty]), expected)


def test_bad_input_is_named() -> None:
    outputs, targets = predictions(2), targets_for([3, 2])
    matcher = rf_detr.HungarianMatcher()
    with pytest.raises(ValueError, match="group_detr must be from 1 to the number of queries, 13, got 14"):
        matcher(outputs, targets, group_detr=14)
    with pytest.raises(NotImplementedError, match="targets have masks"):
        matcher(outputs, [{**target, "masks": torch.zeros(1)} for target in targets])
    with pytest.raises(NotImplementedError, match="return_topk must be False.*got 4"):
        d_fine.HungarianMatcher(WEIGHTS)(outputs, targets, return_topk=4)
    with pytest.raises(NotImplementedError, match="use_pos_only and use_position_modulated_cost must be False"):
        rf_detr.HungarianMatcher(use_pos_only=True)
    with pytest.raises(ValueError, match="target 1 has no 'labels', only"):
        matcher(outputs, [targets[0], theirs_named(targets[1], {"labels": "class_labels"})])
    with pytest.raises(ValueError, match=r"labels and boxes of target 1 must be \[T\] and \[T, 4\]"):
        matcher(outputs, [targets[0], {**targets[1], "boxes": targets[1]["boxes"][:1]}])
    with pytest.raises(ValueError, match="targets must be one dict an image: got 1 for 2 images"):
        matcher(outputs, targets[:1])
    with pytest.raises(IndexError):
        matcher(outputs, [targets[0], {**targets[1], "labels": torch.tensor([0, NUM_CLASSES])}])


def test_no_weight_at_all_is_refused() -> None:
    for kind, weights in (
        (ours.HungarianMatcher, (0, 0, 0)),
        (rt_detr.HungarianMatcher, (dict.fromkeys(WEIGHTS, 0.0),)),
        (rf_detr.HungarianMatcher, (0, 0, 0)),
    ):
        with pytest.raises(ValueError, match="one of the costs of class, bbox and giou must not be 0"):
            kind(*weights)
