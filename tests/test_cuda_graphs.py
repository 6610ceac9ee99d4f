"""CUDA graphs of training and of inference on a GPU, against both without; elsewhere stand-ins test their logic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import small_criterion, small_detr
from torch import nn
from training_data import loader, samples

from detr_fast import fit as fit_module
from detr_fast import optimize
from detr_fast.config import OptimConfig
from detr_fast.finite import NonFiniteLossError
from detr_fast.fit import EpochReport, FitHooks, fit
from detr_fast.graphed_step import GraphedStep
from detr_fast.train_state import TrainState

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIDES = (32, 48, 96)


def trained(model: nn.Module, data: list[Any], **options: Any) -> tuple[TrainState, list[EpochReport]]:
    reports: list[EpochReport] = []
    settings = OptimConfig(**{"epochs": 4, "lr": 1e-4, "lr_drop": 3, **options})
    state = fit(model, small_criterion(), loader(data), settings, on_epoch=lambda state, report: reports.append(report))
    return state, reports


@pytest.mark.parametrize("amp", [False, True])
def test_training(amp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured updates with varying sizes and numbers of targets train as the loop does, over a drop of the rate."""
    torch.manual_seed(1)
    model = small_detr().cuda()
    alone, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    counts = ([3, 1], [0, 2], [0, 0], [9, 40])
    data = [sample for side in SIDES for count in counts for sample in samples(list(count), side)]
    steps: list[GraphedStep] = []

    def step(*arguments: Any, **held: Any) -> GraphedStep:
        steps.append(GraphedStep(*arguments, **held, multiple=64))
        return steps[0]

    monkeypatch.setattr(fit_module, "GraphedStep", step)
    _, expected = trained(alone, data, amp=amp)
    _, found = trained(model, data, amp=amp, cuda_graph=True)
    assert sum(size.replay is not None for size in steps[0].sizes.values()) == 4
    for a, b in zip(found, expected, strict=True):
        assert a.losses["loss"] == pytest.approx(b.losses["loss"], rel=0.05 if amp else 0.01) and a.lr == b.lr
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        # AdamW moves by the rate even where the gradient is rounding, so that two runs part by some of their steps.
        assert amp or (a - b).norm() <= 0.2 * (b - start[name]).norm() + 1e-3, name
        assert a.grad is None


def test_every_replay_drops_other_elements() -> None:
    torch.manual_seed(1)
    losses: list[float] = []
    hooks = FitHooks(on_step=lambda report: losses.append(report.loss), log_every=1)
    options = OptimConfig(epochs=6, lr=0.0, weight_decay=0.0, cuda_graph=True)
    fit(small_detr(dropout=0.5).cuda(), small_criterion(), loader(samples([2, 1])), options, hooks=hooks)
    assert len(set(losses)) == 6


def test_a_loss_that_is_no_number_leaves_the_weights_alone() -> None:
    torch.manual_seed(1)
    model, data = small_detr().cuda(), samples([2, 1]) * 4
    data[6] = (torch.full((3, 32, 32), torch.nan), data[6][1])
    with pytest.raises(NonFiniteLossError, match=r"in epoch 0, update 3; image ids of the batch: \[100, 101\]"):
        trained(model, data, epochs=1, cuda_graph=True)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_inference() -> None:
    torch.manual_seed(1)
    model = small_detr().cuda().eval()
    graphed = optimize(model, cuda_graph=True)
    # A size is captured when it comes the second time.
    for side in SIDES * 3:
        images = torch.randn(2, 3, side, side, device="cuda")
        with torch.inference_mode():
            found, expected = graphed(images), model(images)
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
