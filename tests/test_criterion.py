"""SetCriterion: every loss written out by hand, empty targets, and what its gradients reach."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small import random_outputs, random_targets, small_criterion, small_detr

from detr_fast import HungarianMatcher, SetCriterion
from detr_fast import criterion as criterion_module
from detr_fast.ops import _native
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


class MatchesAsTheOriginal(HungarianMatcher):
    """A matcher with a ``forward`` of its own, so that a criterion goes layer by layer."""

    def forward(self, outputs: dict, targets: list) -> list:
        return super().forward(outputs, targets)


def outputs_of_layers(batch: int = 2, layers: int = 3) -> dict:
    outputs = [random_outputs(batch) for _ in range(layers)]
    for layer in outputs:
        for value in layer.values():
            value.requires_grad_()
    return outputs[0] | {"aux_outputs": outputs[1:]}


def weighted_gradients(criterion: SetCriterion, outputs: dict, targets: list) -> tuple[dict, list[torch.Tensor]]:
    losses = criterion(outputs, targets)
    total = sum((i + 1) * loss for i, loss in enumerate(losses.values()) if loss.requires_grad)
    inputs = [layer[key] for layer in (outputs, *outputs["aux_outputs"]) for key in ("pred_logits", "pred_boxes")]
    return losses, list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("counts", [[3, 2], [0, 4], [0, 0], [9, 7]])
@pytest.mark.parametrize("losses", [["labels", "boxes", "cardinality"], ["boxes", "labels"]])
def test_all_at_once_is_as_layer_by_layer(counts: list[int], losses: list[str]) -> None:
    outputs, targets = outputs_of_layers(), random_targets(counts)
    at_once = SetCriterion(5, HungarianMatcher(1, 5, 2), {}, 0.1, losses)
    by_layer = SetCriterion(5, MatchesAsTheOriginal(1, 5, 2), {}, 0.1, losses)
    (found, gradients), (expected, others) = (weighted_gradients(c, outputs, targets) for c in (at_once, by_layer))
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, others, rtol=1e-5, atol=1e-6)
    assert {name for name, loss in found.items() if not loss.requires_grad} <= {
        *("class_error", "cardinality_error", "cardinality_error_0", "cardinality_error_1")
    }


def test_total_is_the_weighted_sum() -> None:
    outputs, targets = outputs_of_layers(), random_targets([3, 2])
    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou_0": 2.0, "loss_mask": 7.0}
    criterion = SetCriterion(5, HungarianMatcher(1, 5, 2), weights, 0.1, ["labels", "boxes"])
    for factor in (1, 3):  # weights may change between steps
        criterion.weight_dict["loss_ce"] = 1.5 * factor
        losses = criterion(outputs, targets)
        expected = 1.5 * factor * losses["loss_ce"] + 5 * losses["loss_bbox"] + 2 * losses["loss_giou_0"]
        torch.testing.assert_close(criterion.total(losses), expected)


@pytest.mark.parametrize("change", [False, True])
def test_total_and_its_gradient_when_every_loss_has_a_weight(change: bool) -> None:
    outputs, targets = outputs_of_layers(), random_targets([3, 2])
    names = [name + suffix for name in ("loss_ce", "loss_bbox", "loss_giou") for suffix in ("", "_0", "_1")]
    weights = {name: 0.5 + place for place, name in enumerate(names)}
    criterion = SetCriterion(5, HungarianMatcher(1, 5, 2), weights, 0.1, ["labels", "boxes", "cardinality"])
    losses = criterion(outputs, targets)
    if change:
        losses["loss_ce_1"] = losses["loss_ce_1"] ** 2
    expected = sum(weights[name] * losses[name] for name in names)
    total = criterion.total(losses)
    torch.testing.assert_close(total, expected)
    inputs = [layer[key] for layer in (outputs, *outputs["aux_outputs"]) for key in ("pred_logits", "pred_boxes")]
    found, wanted = (torch.autograd.grad(x, inputs, retain_graph=True) for x in (total, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("native", [True, False])
def test_losses_may_be_scaled_in_place(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(_native, "load", lambda: _native.Native(None, "the native module was not built"))
    outputs, targets = outputs_of_layers(), random_targets([3, 2])
    inputs = [layer[key] for layer in (outputs, *outputs["aux_outputs"]) for key in ("pred_logits", "pred_boxes")]
    weights = {f"{name}{suffix}": 0.5 for name in ("loss_ce", "loss_bbox", "loss_giou") for suffix in ("", "_0", "_1")}
    criterion = SetCriterion(5, HungarianMatcher(1, 5, 2), weights, 0.1, ["labels", "boxes", "cardinality"])
    plain = criterion(outputs, targets)
    expected = torch.autograd.grad(sum((place + 1) * plain[name] for place, name in enumerate(weights)), inputs)
    losses = criterion(outputs, targets)
    before = {name: loss.detach().clone() for name, loss in losses.items()}
    for place, name in enumerate(weights):
        losses[name] *= 2 * (place + 1)
    for place, name in enumerate(weights):  # each has memory of its own
        torch.testing.assert_close(losses[name].detach(), 2 * (place + 1) * before[name], rtol=0, atol=0)
    found = torch.autograd.grad(criterion.total(losses), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chosen", [["loss_giou_1"], ["loss_ce", "loss_bbox_0"]])
def test_the_gradient_of_some_losses_alone_and_together_with_all(chosen: list[str]) -> None:
    outputs, targets = outputs_of_layers(), random_targets([3, 2])
    inputs = [layer[key] for layer in (outputs, *outputs["aux_outputs"]) for key in ("pred_logits", "pred_boxes")]
    names = [f"{name}{suffix}" for name in ("loss_ce", "loss_bbox", "loss_giou") for suffix in ("", "_0", "_1")]
    by_layer = SetCriterion(5, MatchesAsTheOriginal(1, 5, 2), dict.fromkeys(names, 1.0), 0.1, ["labels", "boxes"])
    at_once = SetCriterion(5, HungarianMatcher(1, 5, 2), dict.fromkeys(names, 1.0), 0.1, ["labels", "boxes"])
    (found, expected) = (c(outputs, targets) for c in (at_once, by_layer))
    for total in (lambda c, x: 0, lambda c, x: c.total(x)):
        sums = [sum(3 * x[name] for name in chosen) + total(c, x) for c, x in ((at_once, found), (by_layer, expected))]
        ours, theirs = (torch.autograd.grad(x, inputs, retain_graph=True, materialize_grads=True) for x in sums)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_total_of_losses_without_a_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"losses must have one of \['loss_ce'\] \(weight_dict\), got \['loss_x'\]"):
        SetCriterion(5, HungarianMatcher(), {"loss_ce": 1.0}, 0.1, ["labels"]).total({"loss_x": torch.ones(())})


def test_weights_of_classes_may_be_changed() -> None:
    outputs, targets = outputs_of_layers(), random_targets([3, 2])
    found, expected = small_criterion(), small_criterion()
    expected.matcher = MatchesAsTheOriginal(1, 5, 2)
    before = found(outputs, targets)["loss_ce_1"]
    for criterion in (found, expected):
        criterion.empty_weight.copy_(torch.tensor([0.5, 2, 1, 0.7, 3, 0.2]))
    after = found(outputs, targets)["loss_ce_1"]
    torch.testing.assert_close(after, expected(outputs, targets)["loss_ce_1"])
    assert abs(after.item() - before.item()) > 1e-3


class TestSubclass:
    """The ways in which users of the original change its criterion."""

    def test_a_loss_overridden_is_asked_of_every_layer(self) -> None:
        class OnlyL1(SetCriterion):
            calls = 0

            def loss_boxes(self, outputs: dict, targets: list, indices: list, num_boxes: torch.Tensor) -> dict:
                OnlyL1.calls += 1
                losses = super().loss_boxes(outputs, targets, indices, num_boxes)
                return {"loss_bbox": 2 * losses["loss_bbox"]}

        outputs, targets = outputs_of_layers(), random_targets([3, 9])
        losses = OnlyL1(5, HungarianMatcher(1, 5, 2), {}, 0.1, ["labels", "boxes"])(outputs, targets)
        plain = small_criterion()(outputs, targets)
        assert OnlyL1.calls == 3
        assert set(losses) == {"class_error", *(f"loss_{n}{s}" for n in ("ce", "bbox") for s in ("", "_0", "_1"))}
        for suffix in ("", "_0", "_1"):
            torch.testing.assert_close(losses["loss_ce" + suffix], plain["loss_ce" + suffix])
            torch.testing.assert_close(losses["loss_bbox" + suffix], 2 * plain["loss_bbox" + suffix])

    def test_a_loss_of_ones_own(self) -> None:
        class WithSizes(SetCriterion):
            def loss_sizes(self, outputs: dict, targets: list, indices: list, num_boxes: torch.Tensor) -> dict:
                images = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(indices)])
                found = outputs["pred_boxes"][images, torch.cat([queries for queries, _ in indices])]
                wanted = torch.cat([t["boxes"][chosen] for t, (_, chosen) in zip(targets, indices, strict=True)])
                return {"loss_size": (found - wanted)[:, 2:].abs().sum() / num_boxes}

            def get_loss(self, loss: str, *arguments: object, **options: object) -> dict:
                if loss == "sizes":
                    return self.loss_sizes(*arguments)
                return super().get_loss(loss, *arguments, **options)

        outputs, targets = outputs_of_layers(), random_targets([3, 9])
        names = ["labels", "boxes", "cardinality", "sizes"]
        losses = WithSizes(5, HungarianMatcher(1, 5, 2), {}, 0.1, names)(outputs, targets)
        plain = small_criterion()(outputs, targets)
        for name, value in plain.items():
            torch.testing.assert_close(losses.pop(name), value)
        assert set(losses) == {"loss_size", "loss_size_0", "loss_size_1"}
        assert 0 < losses["loss_size_1"] < plain["loss_bbox_1"]

    def test_masks_are_left_to_the_final_layer(self) -> None:
        class WithMasks(SetCriterion):
            def get_loss(self, loss: str, *arguments: object, **options: object) -> dict:
                return {"loss_mask": torch.tensor(1.0)} if loss == "masks" else {}

        losses = WithMasks(5, HungarianMatcher(1, 5, 2), {}, 0.1, ["masks"])(
            outputs_of_layers(), random_targets([1, 2])
        )
        assert list(losses) == ["loss_mask"]

    def test_a_method_replaced_in_the_object(self) -> None:
        criterion = small_criterion()
        criterion.loss_cardinality = lambda *_: {"cardinality_error": torch.tensor(7.0)}
        losses = criterion(outputs_of_layers(), random_targets([1, 2]))
        assert [losses[f"cardinality_error{s}"].item() for s in ("", "_0", "_1")] == [7.0] * 3

    def test_pairs_are_those_of_the_matcher(self) -> None:
        seen = []

        class Looks(SetCriterion):
            def loss_boxes(self, outputs: dict, targets: list, indices: list, num_boxes: torch.Tensor) -> dict:
                seen.append((outputs, indices))
                return {}

        outputs, targets = outputs_of_layers(3), random_targets([3, 9, 0])
        criterion = Looks(5, HungarianMatcher(1, 5, 2), {}, 0.1, ["boxes"])
        criterion(outputs, targets)
        assert len(seen) == 3
        for layer, indices in seen:
            for found, expected in zip(indices, criterion.matcher(layer, targets), strict=True):
                assert [x.tolist() for x in found] == [x.tolist() for x in expected]


def test_layers_of_several_kinds() -> None:
    outputs, targets = random_outputs(2), random_targets([3, 2])
    halved = {key: value.bfloat16() for key, value in random_outputs(2).items()}
    outputs["aux_outputs"] = [random_outputs(2, num_queries=11), random_outputs(2), halved]
    losses = small_criterion()(outputs, targets)
    for number, layer in enumerate(outputs["aux_outputs"]):
        alone = small_criterion()(layer, targets)
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            torch.testing.assert_close(losses[f"{name}_{number}"], alone[name])


def test_refuses_outputs_of_another_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"pred_logits must be \[B, Q, 6\] \(num_classes \+ 1\).*got \[2, 7, 9\]"):
        small_criterion()(random_outputs(2, num_classes=8), random_targets([3, 2]))


def test_a_training_run_follows_that_of_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_detr()
    state = copy.deepcopy(model.state_dict())
    images, targets = torch.randn(2, 3, 64, 96), random_targets([4, 3])
    by_native = train_five_steps(model, images, targets)
    model.load_state_dict(state)
    two_ops = train_five_steps(model, images, targets, MatchesAlone(1, 5, 2))
    monkeypatch.setattr(_native, "load", lambda: _native.Native(None, "the native module was not built"))
    model.load_state_dict(state)
    by_reference = train_five_steps(model, images, targets)
    assert abs(by_native[-1]["loss_ce"] - by_native[0]["loss_ce"]) > 1e-3, "the run goes somewhere"
    for found, alone, expected in zip(by_native, two_ops, by_reference, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert alone == pytest.approx(expected, rel=1e-5, abs=1e-6)


class MatchesAlone(HungarianMatcher):
    """With a method of its own, so that matching and losses are not one op."""

    def match_packed(self, *arguments: object) -> torch.Tensor:
        return super().match_packed(*arguments)


def test_matching_and_losses_are_one_op_unless_the_matcher_has_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = [], criterion_module.stacked_results
    monkeypatch.setattr(criterion_module, "stacked_results", lambda *a, **o: (calls.append(a), run(*a, **o))[1])
    outputs, targets, criterion = random_outputs(2), random_targets([4, 3]), small_criterion()
    expected = criterion(outputs, targets)
    assert len(calls) == 1
    criterion.matcher = MatchesAlone(
        criterion.matcher.cost_class, criterion.matcher.cost_bbox, criterion.matcher.cost_giou
    )
    found = criterion(outputs, targets)
    assert len(calls) == 1 and found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def train_five_steps(
    model: torch.nn.Module, images: torch.Tensor, targets: list, matcher: HungarianMatcher | None = None
) -> list[dict[str, float]]:
    criterion, backbone = small_criterion(), list(model.backbone.parameters())
    if matcher is not None:
        criterion.matcher = matcher
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone")]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": backbone, "lr": 1e-4}], lr=1e-3, weight_decay=1e-4)
    history = []
    for _ in range(5):
        losses = criterion(model(images), targets)
        history.append({name: value.item() for name, value in losses.items()})
        optimizer.zero_grad()
        weights = {
            name: next((w for k, w in criterion.weight_dict.items() if name.startswith(k)), 0) for name in losses
        }
        sum(losses[name] * weight for name, weight in weights.items()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return history


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
