"""Training updates as CUDA graphs, whose capture is played on the CPU; test_cuda_graphs.py has those on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_criterion, small_detr
from torch import Tensor, nn
from training_data import SMALL_MODEL, config, loader, samples
from waits import no_waits

from detr_fast import HungarianMatcher, SetCriterion, graphed_step
from detr_fast import fit as fit_module
from detr_fast.config import OptimConfig
from detr_fast.criterion import why_not_padded
from detr_fast.data.batch import ImageBatch, collate
from detr_fast.finite import NonFiniteLossError
from detr_fast.fit import EpochReport, FitHooks, fit
from detr_fast.graphed_step import GraphedStep, StaticBatch, Values, room_for, why_not_graphed
from detr_fast.ops import PackedTargets
from detr_fast.train_state import TrainState

CPU = torch.device("cpu")
# Exact in float32, which is what a graph reads its learning rate as; so is a tenth of it, 2^-13.
RATE = 10 * 2.0**-13


class Player:
    """Plays captures: what is captured has no effect, and a replay does it with what then lies in the same memory."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.optimizer: torch.optim.Optimizer | None = None
        self.captured = self.replays = 0

    def __call__(self, run: Callable[[], Values]) -> Callable[[], Values]:
        self.captured += 1
        before, random = [x.clone() for x in self._tensors()], torch.get_rng_state()
        # What the host looked at would be part of a graph for good. On the CPU it reads counts and masks all the same.
        with no_waits("trimmed", "of"):
            results = run()
        assert len(before) == len(list(self._tensors())), "something was made for good while capturing"
        for tensor, value in zip(self._tensors(), before, strict=True):
            tensor.data.copy_(value)
        torch.set_rng_state(random)
        for result in results:
            result.fill_(torch.nan)

        def replay() -> Values:
            self.replays += 1
            for result, value in zip(results, run(), strict=True):
                result.copy_(value)
            return results

        return replay

    def _tensors(self) -> Iterator[Tensor]:
        for module in self.modules:
            yield from (*module.parameters(), *module.buffers())
        assert self.optimizer is not None
        for state in self.optimizer.state.values():
            yield from (x for x in state.values() if isinstance(x, Tensor))


@pytest.fixture()
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Player]:
    """From then on ``fit`` plays its graphs; ``multiple`` and ``most`` are those of GraphedStep."""

    def start(model: nn.Module, **options: Any) -> Player:
        player = Player(model)

        def step(update: Any, optimizer: torch.optim.Optimizer, **held: Any) -> GraphedStep:
            player.optimizer = optimizer
            return GraphedStep(update, optimizer, capture=player, **held, **{"multiple": 16, **options})

        monkeypatch.setattr(fit_module, "GraphedStep", step)
        monkeypatch.setattr(fit_module, "why_not_graphed", lambda device, criterion: why_not_padded(criterion))
        return player

    return start


def ragged(batches: int = 3, sides: tuple[int, ...] = (32, 64)) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Batches of two images, of several sizes, with other numbers of targets each time: none, and more than queries."""
    counts = [[3, 1], [0, 2], [0, 0], [9, 0], [1, 40]]
    data = [samples(counts[(i + j) % len(counts)], side) for i in range(batches) for j, side in enumerate(sides)]
    return [sample for batch in data for sample in batch]


def trained(
    model: nn.Module, data: Any, *, lr: float = RATE, hooks: FitHooks | None = None, **options: Any
) -> tuple[TrainState, list[EpochReport]]:
    reports: list[EpochReport] = []
    settings = OptimConfig(**{"epochs": 2, "lr": lr, "lr_backbone": lr / 2, "lr_drop": 100, **options})
    state = fit(
        model,
        small_criterion(),
        loader(data),
        settings,
        on_epoch=lambda state, report: reports.append(replace(report, seconds=0)),
        hooks=hooks,
    )
    return state, reports


def assert_same_state(found: TrainState, expected: TrainState) -> None:
    for (name, a), b in zip(found.model.state_dict().items(), expected.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states = [s.optimizer.state_dict()["state"] for s in (found, expected)]
    assert states[0].keys() == states[1].keys() and states[0]
    for number in states[0]:
        assert all(torch.equal(states[0][number][key], states[1][number][key]) for key in states[1][number])
    assert found.optimizer.state_dict()["param_groups"] == expected.optimizer.state_dict()["param_groups"]


def test_updates_are_the_loops_to_the_last_bit(play: Callable[..., Player]) -> None:
    torch.manual_seed(1)
    model, data = small_detr(), ragged(5)
    start = copy.deepcopy(model.state_dict())
    expected, expected_reports = trained(copy.deepcopy(model), data, epochs=3)
    player = play(model)
    found, reports = trained(model, data, epochs=3, cuda_graph=True)
    assert_same_state(found, expected)
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert reports == expected_reports
    # The ten batches of an epoch are of two sizes, and those with 40 targets in an image of two more. Of each size the
    # first batch is as without graphs, the second makes the memory, and all others are replays.
    assert player.captured == 4 and player.replays == 3 * 10 - 4 * 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_to_a_common_size_changes_roundings_alone(play: Callable[..., Player]) -> None:
    torch.manual_seed(1)
    # In float64, where no two matchings are as near to each other as roundings; and with a learning rate of next to
    # nothing, because AdamW makes steps of gradients that are roundings.
    model = small_detr().double()
    data = [(image.double(), target) for image, target in ragged(4, (32, 48))]
    _, expected = trained(copy.deepcopy(model), data, lr=1e-12)
    player = play(model, multiple=64)
    _, reports = trained(model, data, lr=1e-12, cuda_graph=True)
    assert player.captured == 1
    for found, wanted in zip(reports, expected, strict=True):
        assert found.losses == pytest.approx(wanted.losses, rel=1e-6)


@pytest.mark.parametrize("by", ["factor", "drop"])
def test_a_schedule_goes_on_in_replays(by: str, play: Callable[..., Player]) -> None:
    torch.manual_seed(1)
    model, data = small_detr(), ragged(1, (32,)) * 2
    hooks = FitHooks(lr_factor=lambda done: 2.0 ** -int(done * 12)) if by == "factor" else None
    drop = {} if by == "factor" else {"lr_drop": 3}
    expected, expected_reports = trained(copy.deepcopy(model), data, epochs=6, hooks=hooks, **drop)
    player = play(model)
    found, reports = trained(model, data, epochs=6, hooks=hooks, cuda_graph=True, **drop)
    assert player.captured == 1 and player.replays == 10
    assert reports[0].lr > reports[-1].lr
    assert [report.lr for report in reports] == [report.lr for report in expected_reports]
    assert_same_state(found, expected)
    assert isinstance(found.optimizer.param_groups[0]["lr"], float)


@pytest.mark.parametrize("amp", [False, True])
def test_with_an_average_and_clipping_in_bfloat16(amp: bool, play: Callable[..., Player]) -> None:
    torch.manual_seed(1)
    model, data = small_detr(), ragged(2)
    options = {"amp": amp, "ema_decay": 0.9, "clip_max_norm": 0.05, "epochs": 3}
    expected, expected_reports = trained(copy.deepcopy(model), data, **options)
    player = play(model)
    found, reports = trained(model, data, cuda_graph=True, **options)
    assert player.replays > 0 and reports == expected_reports
    assert_same_state(found, expected)
    assert found.ema is not None and expected.ema is not None
    pairs = zip(found.ema.model.state_dict().values(), expected.ema.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_every_replay_drops_other_elements(play: Callable[..., Player]) -> None:
    torch.manual_seed(1)
    model = small_detr(dropout=0.5)
    losses: list[float] = []
    hooks = FitHooks(on_step=lambda report: losses.append(report.loss), log_every=1)
    player = play(model)
    trained(model, samples([2, 1]), lr=0.0, weight_decay=0.0, epochs=6, hooks=hooks, cuda_graph=True)
    assert player.replays == 4
    assert len(set(losses)) == 6


def test_a_loss_that_is_no_number_leaves_the_weights_alone(play: Callable[..., Player]) -> None:
    torch.manual_seed(1)
    model, data = small_detr(), samples([2, 1]) * 4
    data[6] = (torch.full((3, 32, 32), torch.nan), data[6][1])
    expected, _ = trained(copy.deepcopy(model), data[:6], epochs=1)
    player = play(model)
    with pytest.raises(NonFiniteLossError, match=r"in epoch 0, update 3; image ids of the batch: \[100, 101\]"):
        trained(model, data, epochs=1, cuda_graph=True)
    assert player.replays == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.model.parameters(), strict=True))


def test_beyond_the_most_graphs_batches_are_as_without(play: Callable[..., Player]) -> None:
    torch.manual_seed(1)
    model, data = small_detr(), ragged(4, (32, 48, 64))
    expected, _ = trained(copy.deepcopy(model), data)
    player = play(model, most=1)
    found, _ = trained(model, data, cuda_graph=True)
    assert_same_state(found, expected)
    assert player.captured == 1


def test_resuming_goes_on_with_the_optimizers_state(play: Callable[..., Player]) -> None:
    torch.manual_seed(1)
    model, data = small_detr(), ragged(2)
    options = {"epochs": 4, "ema_decay": 0.9}
    expected, _ = trained(copy.deepcopy(model), data, **options)
    player = play(model)
    half, _ = trained(model, data, cuda_graph=True, **{**options, "epochs": 2})
    checkpoint = copy.deepcopy(half.checkpoint())
    assert player.replays > 0
    for group in checkpoint["optimizer"]["param_groups"]:
        assert isinstance(group["lr"], float) and group["capturable"] is False
    torch.manual_seed(2)
    again = small_detr()
    player = play(again)
    settings = OptimConfig(lr=RATE, lr_backbone=RATE / 2, lr_drop=100, cuda_graph=True, **options)
    found = TrainState.start(again, settings)
    found.restore(checkpoint)
    fit(again, small_criterion(), loader(data), settings, state=found)
    assert player.replays > 0 and found.step == expected.step
    assert_same_state(found, expected)


def test_graphs_are_forgotten_where_state_moves() -> None:
    torch.manual_seed(1)
    model, criterion = small_detr(), small_criterion()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    player = Player(model)
    player.optimizer = optimizer
    images, targets = collate(samples([2, 1]))

    def update(images: ImageBatch, targets: Any) -> graphed_step.Update:
        optimizer.zero_grad()
        losses = criterion.of_padded(model(images), targets)
        total = criterion.total(losses)
        total.backward()
        optimizer.step()
        return graphed_step.Update(losses, total.detach(), torch.ones(()))

    step = GraphedStep(update, optimizer, held=criterion.held, capture=player)
    assert step(images, targets) is None
    assert [step(images, targets) is None for _ in range(3)] == [False] * 3
    assert player.captured == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(step(images, targets) is not None for _ in range(3))
    assert player.captured == 2
    criterion.weight_dict["loss_ce"] = 2.0
    criterion.total(criterion(model(images), targets))
    assert all(step(images, targets) is not None for _ in range(3))
    assert player.captured == 3


def test_memory_holds_a_batch_and_padding() -> None:
    images = ImageBatch.of([torch.ones(3, 40, 64), torch.ones(3, 20, 10)])
    packed = PackedTargets(torch.arange(5), torch.rand(5, 4), [5, 0])
    memory = StaticBatch((2, 3, 64, 96), images, packed, room_for([5, 0]))
    memory.images.fill_(7)
    memory.fill(images, packed)
    batch, targets = memory.batch()
    assert batch.sizes is None and batch.padded is None
    assert torch.equal((~batch.mask).sum((1, 2)), torch.tensor([40 * 64, 20 * 10]))
    assert torch.equal(batch.images[:, 0] == 0, batch.mask)
    assert targets.offsets.tolist() == [0, 5, 5] and len(targets.labels) == 2 * 32
    assert torch.equal(targets.trimmed().boxes, packed.boxes)


@pytest.mark.parametrize(("counts", "room"), [([], 32), ([0], 32), ([32, 3], 32), ([33], 64), ([1, 100], 128)])
def test_room_for_targets(counts: list[int], room: int) -> None:
    assert room_for(counts) == room


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="cuda_graph cannot be used here: CUDA graphs need a CUDA device, got cpu"):
        fit(small_detr(), small_criterion(), loader(ragged()), OptimConfig(cuda_graph=True))


def test_graphs_need_kernels_that_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"native": "it was not built", "triton": None, "reference": None}
    monkeypatch.setattr("detr_fast.ops._dispatch.Op.reasons", lambda op, device: reasons)
    found = why_not_graphed(torch.device("cuda"), small_criterion())
    assert found == "matching waits for the device without its native kernel, and it was not built"


class OwnLabels(SetCriterion):
    def loss_labels(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        return super().loss_labels(*arguments, **options)


class OwnMatcher(HungarianMatcher):
    def forward(self, outputs: Any, targets: Any) -> Any:
        return super().forward(outputs, targets)


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        (nn.Linear(1, 1), "Linear computes its losses in its own way"),
        (OwnLabels(5, HungarianMatcher(), {}, 0.1, ["labels"]), "OwnLabels computes some of its losses layer by layer"),
        (small_criterion(masks=True), "SetCriterion computes some of its losses layer by layer: of .*masks.* all but"),
        (SetCriterion(5, OwnMatcher(), {}, 0.1, ["labels"]), "OwnMatcher matches in its own way"),
        (SetCriterion(5, HungarianMatcher(strict=True), {}, 0.1, ["labels"]), "a strict matcher looks at its costs"),
    ],
)
def test_what_a_graph_cannot_hold(criterion: nn.Module, reason: str, play: Callable[..., Player]) -> None:
    assert why_not_padded(small_criterion()) is None
    model = small_detr()
    play(model)
    with pytest.raises(ValueError, match=f"cuda_graph cannot be used here: {reason}"):
        fit(model, criterion, loader(ragged()), OptimConfig(cuda_graph=True))


@pytest.mark.parametrize(
    ("optim", "model", "message"),
    [
        ({"compile": True}, {}, "cuda_graph must be used without compile, got True"),
        ({"accumulate": 2}, {}, "accumulate must be 1 with cuda_graph, got 2"),
        ({}, {"masks": True}, "masks must be off with cuda_graph, got True"),
        ({}, {"activation_checkpointing": True}, "activation_checkpointing must be off with cuda_graph, got True"),
    ],
)
def test_what_does_not_go_with_graphs(tmp_path: Path, optim: Any, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, optim={"cuda_graph": True, **optim}, model=replace(SMALL_MODEL, **model))
