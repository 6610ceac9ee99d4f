"""The training loop: one update against the same written out, accumulation, averages, schedules, losses not finite."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from small import small_criterion, small_detr
from torch import Tensor, nn
from training_data import loader, samples

from detr_fast.config import ModelConfig, OptimConfig
from detr_fast.data.batch import collate
from detr_fast.ema import ModelEma
from detr_fast.finite import FiniteGuard, NonFiniteLossError
from detr_fast.fit import EpochReport, FitHooks, Interrupted, StepReport, clip_gradients, fit
from detr_fast.matcher import HungarianMatcher
from detr_fast.train_state import TrainState, build_optimizer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weighted(criterion: Any, losses: dict[str, Tensor]) -> Tensor:
    return sum((losses[name] * weight for name, weight in criterion.weight_dict.items()), torch.zeros(()))


def gradients(model: nn.Module, data: list[Any]) -> dict[str, Tensor]:
    model.zero_grad()
    criterion = small_criterion()
    images, targets = collate(data)
    weighted(criterion, criterion(model(images), targets)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_an_update_is_the_papers() -> None:
    """Clip to 0.1, AdamW, two learning rates: against torch's plain AdamW in a loop of five lines."""
    # In float64: Adam divides a gradient by its size, and that of a key's bias is nothing but rounding.
    model = small_detr().double()
    data = [(image.double(), target | {"boxes": target["boxes"].double()}) for image, target in samples([2, 1, 0, 3])]
    by_hand = copy.deepcopy(model)
    groups = [
        {"params": [p for n, p in by_hand.named_parameters() if "backbone" not in n], "lr": 1e-3},
        {"params": [p for n, p in by_hand.named_parameters() if "backbone" in n], "lr": 1e-4},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05, fused=False, foreach=False)
    for batch in (data[:2], data[2:]):
        found = gradients(by_hand, batch)
        norm = torch.stack([g.norm() for g in found.values()]).norm()
        assert norm > 0.1
        for parameter, gradient in zip(by_hand.parameters(), found.values(), strict=True):
            parameter.grad = gradient * (0.1 / norm)
        optimizer.step()

    fit(model, small_criterion(), loader(data), OptimConfig(epochs=1, lr=1e-3, lr_backbone=1e-4, weight_decay=0.05))

    start = weights(by_hand)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, start[name], rtol=1e-7, atol=1e-9)


def test_optimizer_has_every_trained_parameter_once() -> None:
    model = small_detr()
    model.backbone.requires_grad_(False)
    next(model.backbone.parameters()).requires_grad_(True)
    rest, backbone = build_optimizer(model, OptimConfig()).param_groups
    assert (rest["lr"], backbone["lr"]) == (1e-4, 1e-5)
    assert rest["weight_decay"] == backbone["weight_decay"] == 1e-4
    assert len(backbone["params"]) == 1
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in rest["params"] + backbone["params"]} == {id(p) for p in trained}


def test_accumulated_gradient_is_the_mean_of_its_batches() -> None:
    model, data = small_detr(), samples([2, 1, 0, 3])
    first, second = (gradients(copy.deepcopy(model), batch) for batch in (data[:2], data[2:]))
    fit(model, small_criterion(), loader(data), OptimConfig(epochs=1, accumulate=2, clip_max_norm=0))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-6)


def test_last_group_of_batches_may_be_smaller() -> None:
    model, data = small_detr(), samples([1, 2, 3])
    last = gradients(copy.deepcopy(model), data[2:])
    frozen = OptimConfig(epochs=1, accumulate=2, clip_max_norm=0, lr=0, lr_backbone=0)
    state = fit(model, small_criterion(), loader(data, 1), frozen)
    assert state.step == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, last[name], rtol=1e-4, atol=1e-6)


def test_batches_without_any_target() -> None:
    state = fit(small_detr(), small_criterion(), loader(samples([0, 0, 0, 0])), OptimConfig(epochs=2))
    assert state.step == 4


def test_reports() -> None:
    steps: list[StepReport] = []
    epochs: list[EpochReport] = []
    model, criterion, data = small_detr(), small_criterion(), samples([1, 2, 3, 0, 1, 1])
    fit(
        copy.deepcopy(model),
        criterion,
        loader(data),
        OptimConfig(epochs=2, lr=0, lr_backbone=0, lr_drop=1),
        on_epoch=lambda state, report: epochs.append(report),
        hooks=FitHooks(on_step=steps.append, log_every=2),
    )
    expected = [(0, 2, 3, 4), (0, 3, 3, 6), (1, 2, 3, 4), (1, 3, 3, 6)]
    assert [(s.epoch, s.step, s.steps, s.images) for s in steps] == expected
    with torch.no_grad():
        batches = [criterion(model(collate(data[i : i + 2])[0]), collate(data[i : i + 2])[1]) for i in (0, 2, 4)]
    totals = [float(weighted(criterion, losses)) for losses in batches]
    assert steps[0].loss == pytest.approx(sum(totals[:2]) / 2, rel=1e-5)
    assert steps[1].loss == pytest.approx(totals[2], rel=1e-5)
    losses = epochs[0].losses
    assert losses["loss"] == pytest.approx(sum(totals) / 3, rel=1e-5)
    assert losses["loss_bbox"] == pytest.approx(sum(float(b["loss_bbox"]) for b in batches) / 3 * 5, rel=1e-5)
    assert losses["loss_ce"] + losses["loss_bbox"] + losses["loss_giou"] == pytest.approx(losses["loss"], rel=1e-5)
    assert losses["class_error"] == pytest.approx(sum(float(b["class_error"]) for b in batches) / 3, rel=1e-5)


def test_learning_rate_drops() -> None:
    rates: list[float] = []
    options = OptimConfig(epochs=3, lr=1e-3, lr_drop=2)
    fit(small_detr(), small_criterion(), loader(samples([1, 1])), options, on_epoch=lambda _, r: rates.append(r.lr))
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4])


def test_learning_rate_by_the_part_done() -> None:
    asked: list[float] = []

    def factor(done: float) -> float:
        asked.append(done)
        return 1 - done

    rates: list[float] = []
    options = OptimConfig(epochs=2, lr=1e-3, lr_backbone=1e-4, lr_drop=1)
    hooks = FitHooks(lr_factor=factor, on_step=lambda report: rates.append(report.lr), log_every=1)
    state = fit(small_detr(), small_criterion(), loader(samples([1, 1, 1, 1])), options, hooks=hooks)
    assert asked == pytest.approx([0, 0.25, 0.5, 0.75])
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert state.optimizer.param_groups[1]["lr"] == pytest.approx(0.25e-4)


def test_max_seconds_ends_within_an_epoch() -> None:
    epochs: list[EpochReport] = []
    state = fit(
        small_detr(),
        small_criterion(),
        loader(samples([1] * 40)),
        OptimConfig(epochs=100),
        on_epoch=lambda _, report: epochs.append(report),
        hooks=FitHooks(max_seconds=0.5, on_step=lambda _: time.sleep(0.1), log_every=1),
    )
    assert 1 <= state.step <= 5
    assert [report.epoch for report in epochs] == [0]


def test_stops_after_the_update_in_progress() -> None:
    state = TrainState.start(small_detr(), OptimConfig())
    hooks = FitHooks(should_stop=lambda: 15 if state.step == 2 else 0)
    with pytest.raises(Interrupted) as stop:
        fit(state.model, small_criterion(), loader(samples([1] * 8)), OptimConfig(), state=state, hooks=hooks)
    assert stop.value.signum == 15
    assert not stop.value.at_once
    assert (state.step, state.epoch) == (2, -1)


def test_no_batch() -> None:
    empty = torch.utils.data.DataLoader(samples([1]), 2, drop_last=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train_loader has no batch"):
        fit(small_detr(), small_criterion(), empty, OptimConfig())


def test_bfloat16_forward_keeps_float32_weights() -> None:
    seen: list[torch.dtype] = []
    model = small_detr()
    model.class_embed.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    state = fit(model, small_criterion(), loader(samples([1, 2])), OptimConfig(epochs=1, amp=True, ema_decay=0.5))
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert state.step == 1


# ---- the moving average


def test_moving_average() -> None:
    model = nn.BatchNorm1d(2)
    ema = ModelEma(model, 0.5)
    expected = weights(model)
    for update in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter))
        model(torch.randn(4, 2))
        ema.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = {
            name: decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_moving_average_follows_training_and_is_evaluated() -> None:
    model = small_detr()
    state = fit(model, small_criterion(), loader(samples([1, 2])), OptimConfig(epochs=3, ema_decay=0.9, lr=1e-2))
    assert state.ema is not None and state.eval_model is state.ema.model
    assert state.ema.updates == 3
    assert not equal(weights(state.ema.model), weights(model))


def test_bad_decay() -> None:
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\), got 1.0"):
        ModelEma(small_detr(), 1.0)


# ---- losses that are not finite


class Poisoned(nn.Module):
    """A criterion whose box loss is not finite for the image 102."""

    def __init__(self, value: float, *, through_gradient: bool = False) -> None:
        super().__init__()
        self.inner = small_criterion()
        self.weight_dict, self.num_classes = self.inner.weight_dict, self.inner.num_classes
        self.value, self.through_gradient = value, through_gradient

    def forward(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        losses = self.inner(outputs, targets)
        if any(int(target["image_id"]) == 102 for target in targets):
            if self.through_gradient:  # sqrt has an infinite slope at 0
                losses["loss_bbox"] = losses["loss_bbox"] + (outputs["pred_boxes"].sum() * 0).sqrt()
            else:
                losses["loss_bbox"] = losses["loss_bbox"] + self.value
        return losses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(value: float) -> None:
    # Added to the loss, it has a finite gradient: the gradient alone would not show it.
    model, data = small_detr(), samples([1, 2, 1, 0, 3, 1])
    clean = copy.deepcopy(model)
    fit(clean, small_criterion(), loader(data[:2]), OptimConfig(epochs=1))
    state = TrainState.start(model, OptimConfig())
    with pytest.raises(NonFiniteLossError, match=r"loss_bbox not finite in epoch 0, update 1; .*\[102, 103\]") as error:
        fit(model, Poisoned(value), loader(data), OptimConfig(), state=state)
    assert error.value.image_ids == [102, 103]
    assert error.value.terms == ["loss_bbox"]
    assert torch.equal(error.value.targets[0]["boxes"], data[2][1]["boxes"])
    assert equal(weights(model), weights(clean))
    assert state.step == 1


def test_a_gradient_that_is_not_finite() -> None:
    model = small_detr()
    before = weights(model)
    with pytest.raises(NonFiniteLossError, match=r"the gradient is not finite, though the losses are.*\[102, 103\]"):
        fit(model, Poisoned(0, through_gradient=True), loader(samples([1] * 4)[2:]), OptimConfig())
    assert equal(weights(model), before)


@pytest.mark.parametrize(("strict", "terms"), [(False, "loss_ce, "), (True, "pred_logits and pred_boxes ")])
def test_outputs_that_are_not_finite(strict: bool, terms: str) -> None:
    """Whether the matcher goes on with such costs or refuses them, the images are named."""
    model, criterion = small_detr(), small_criterion()
    criterion.matcher = HungarianMatcher(1, 5, 2, strict=strict)
    with torch.no_grad():
        model.class_embed.bias[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=rf"{terms}.*not finite .*\[100, 101\]"):
        fit(model, criterion, loader(samples([1, 1])), OptimConfig())


def test_accumulated_batches_are_told_apart() -> None:
    with pytest.raises(NonFiniteLossError) as error:
        fit(small_detr(), Poisoned(float("nan")), loader(samples([1] * 6)), OptimConfig(accumulate=3))
    assert error.value.image_ids == [102, 103]


def test_the_optimizer_is_stopped_on_the_device_too() -> None:
    """Where the answer is read one update late, ``found_inf`` has kept the update away meanwhile."""
    model = small_detr()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    guard = FiniteGuard(optimizer, torch.device("cpu"))
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    guard.saw(samples([1])[0][1:], {"loss_ce": torch.tensor(float("nan"))}, torch.tensor(float("nan")))
    with pytest.raises(NonFiniteLossError, match="loss_ce not finite"):
        guard.check(torch.tensor(float("nan")), 0, 0)
    optimizer.step()
    assert equal(weights(model), before)
    guard.saw([], {}, torch.tensor(1.0))
    guard.check(torch.tensor(1.0), 0, 0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not equal(weights(model), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([5])}, "label 5 of target 1, object 0 means 'no object'"),
        ({"boxes": torch.tensor([[10.0, 10.0, 20.0, 20.0]])}, "boxes in pixels"),
        ({"boxes": torch.tensor([[0.5, 0.5, -0.1, 0.1]])}, "negative width"),
        ({"boxes": torch.tensor([[0.5, float("nan"), 0.1, 0.1]])}, "is not finite"),
        ({"boxes": torch.tensor([[0.6, 0.6, 0.9, 0.9]])}, "are these xyxy"),
    ],
)
def test_a_bad_target_is_named(change: dict[str, Tensor], message: str) -> None:
    data = samples([1, 1])
    data[1][1].update(change)
    with pytest.raises(ValueError, match=rf"{message}.*image ids of this batch: \[100, 101\]"):
        fit(small_detr(), small_criterion(), loader(data), OptimConfig())


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_optimisation_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 30}, "hidden_dim must be a multiple of .*8, got 30"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"num_queries": 0}, "num_queries must be positive, got 0"),
        ({"position_embedding": "cosine"}, "position_embedding must be one of .* got 'cosine'"),
    ],
)
def test_bad_model_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_clipping_in_the_optimizers_pass_is_as_clipping_before_it(size: float, max_norm: float) -> None:
    start = [torch.randn(33, 7), torch.randn(5)]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    options = {"lr": 1e-2, "weight_decay": 1e-2}
    fused, plain = torch.optim.AdamW(ours, fused=True, **options), torch.optim.AdamW(theirs, foreach=False, **options)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = size * torch.randn_like(one) / 16
            other.grad = one.grad.clone()
        norm = clip_gradients(ours, max_norm, fused)
        expected = nn.utils.clip_grad_norm_(theirs, max_norm or float("inf"))
        torch.testing.assert_close(norm, expected)
        fused.step()
        plain.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert fused.state_dict().keys() == plain.state_dict().keys()
