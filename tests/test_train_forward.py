"""Training with a compiled model, with recomputed activations, and with CUDA graphs, whose capture is played."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import PatchBackbone, small_criterion, small_detr
from torch import Tensor, nn
from training_data import SMALL_MODEL, config, loader, samples
from typer.testing import CliRunner

from detr_fast import Detr, Transformer
from detr_fast import fit as fit_module
from detr_fast import train as train_module
from detr_fast import train_forward as module
from detr_fast.cli import app
from detr_fast.config import OptimConfig, TrainConfig
from detr_fast.data.batch import ImageBatch
from detr_fast.fit import fit
from detr_fast.train_forward import GraphedModel, pad_to_multiple, train_forward, why_not_compiled

CPU = torch.device("cpu")
# Of three sizes, two of which are one when padded to multiples of 64.
SIDES = (32, 48, 96)


def ragged(seed: int = 0) -> list[tuple[Tensor, dict[str, Tensor]]]:
    torch.manual_seed(seed)
    return [sample for side in SIDES for sample in samples([2, 1], side)]


class Player:
    """Plays a capture: it has static inputs, warms up, and runs the module anew in place of a replay."""

    def __init__(self) -> None:
        self.captured: list[tuple[int, ...]] = []
        self.replays = 0

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, Tensor]) -> Callable[[Tensor, Tensor], Any]:
        images, mask = arguments
        self.captured.append(tuple(images.shape))
        for _ in range(3):
            outputs = module(images, mask)
            torch.autograd.grad(outputs["pred_boxes"].sum(), list(module.parameters()), allow_unused=True)

        def replay(new_images: Tensor, new_mask: Tensor) -> Any:
            self.replays += 1
            images.copy_(new_images)
            mask.copy_(new_mask)
            return module(images, mask)

        return replay


def trained(model: nn.Module, data: Any = None, **options: Any) -> dict[str, Tensor]:
    fit(model, small_criterion(), loader(data or ragged()), OptimConfig(epochs=2, lr=1e-3, **options))
    return model.state_dict()


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    assert any(not torch.equal(start[name], value) for name, value in expected.items())
    for name, value in expected.items():
        # AdamW moves by lr whatever the gradient's size: where that is rounding, two runs part by some of their steps.
        torch.testing.assert_close(found[name], value, rtol=0, atol=6 * 1e-3 if "in_proj_bias" in name else 2e-4)


# ---- compiled


def test_compiled_training_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's front end alone: it traces the model through the loop, and its code generator takes long."""
    compiled: list[nn.Module] = []

    def front_end(model: nn.Module) -> Any:
        compiled.append(model)
        return by_torch(model, backend="eager")

    by_torch = torch.compile
    monkeypatch.setattr(torch, "compile", front_end)
    torch.manual_seed(1)
    # As few layers as there can be, and one size: tracing takes seconds.
    transformer = Transformer(16, 2, 1, 1, 32, dropout=0.0, return_intermediate_dec=True)
    model, data = Detr(PatchBackbone(), transformer, 5, 7), ragged()[:2]
    start, plain = copy.deepcopy(model.state_dict()), trained(copy.deepcopy(model), data)
    assert_near(trained(model, data, compile=True), plain, start)
    assert compiled == [model]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile cannot be used here: .* C\+\+ compiler, and 'no-such-compiler' is"):
        train_forward(small_detr(), OptimConfig(compile=True), CPU)
    monkeypatch.setattr(module._triton, "why_not", lambda device: "triton is not installed")
    assert why_not_compiled(torch.device("cuda")) == "torch.compile makes Triton kernels, and triton is not installed"
    assert train_forward(small_detr(), OptimConfig(), CPU).training


# ---- activations computed twice


def test_recomputed_activations_train_the_same_run(tmp_path: Path) -> None:
    """From the command line's flag to the weights, with dropout: the second computation drops the same elements."""
    optim = {"epochs": 1}
    model = replace(SMALL_MODEL, dropout=0.2)
    plain = train_module.train(config(tmp_path, optim=optim, model=model, output_dir=tmp_path / "plain")).state
    saving = replace(model, activation_checkpointing=True)
    found = train_module.train(config(tmp_path, optim=optim, model=saving, output_dir=tmp_path / "saving")).state
    assert found.model.transformer.encoder.activation_checkpointing
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flag", ["activation_checkpointing", "compile", "cuda_graph", "no_reduced_decoding"])
def test_the_command_line_has_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    asked: list[TrainConfig] = []
    monkeypatch.setattr(train_module, "train", asked.append)
    files = [f"--{name}={tmp_path}" for name in ("train-images", "train-annotations", "val-images", "val-annotations")]
    result = CliRunner().invoke(app, ["train", *files, f"--output={tmp_path}", f"--{flag.replace('_', '-')}"])
    assert result.exit_code == 0, result.output
    (found,) = asked
    values = {**vars(found), **vars(found.model), **vars(found.optim)}
    assert values[flag.removeprefix("no_")] is not flag.startswith("no_")


# ---- CUDA graphs


def test_training_by_graphs_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model, player = small_detr(), Player()
    start, plain = copy.deepcopy(model.state_dict()), trained(copy.deepcopy(model))
    graphed = GraphedModel(model, multiple=64, capture=player)
    monkeypatch.setattr(fit_module, "train_forward", lambda *_: graphed)
    assert_near(trained(model, cuda_graph=True), plain, start)
    assert player.captured == [(2, 3, 64, 64), (2, 3, 128, 128)]
    assert player.replays == 2 * len(SIDES)


def test_beyond_the_most_graphs_the_model_runs_as_it_is() -> None:
    model, player = small_detr(), Player()
    graphed = GraphedModel(model, multiple=64, most=1, capture=player)
    for side in (96, 32, 48):
        images = torch.randn(2, 3, side, side)
        outputs = graphed(images)
        torch.testing.assert_close(outputs["pred_boxes"], model(images)["pred_boxes"], rtol=1e-5, atol=1e-6)
    assert player.captured == [(2, 3, 128, 128)] and player.replays == 1


def test_every_replay_drops_other_elements() -> None:
    graphed, images = GraphedModel(small_detr(dropout=0.5), capture=Player()), torch.randn(1, 3, 64, 64)
    first, second = (graphed(images)["pred_logits"] for _ in range(2))
    assert not torch.equal(first, second)


def test_warming_up_leaves_statistics_alone() -> None:
    model = small_detr()
    model.backbone[0].body = nn.Sequential(model.backbone[0].body, nn.BatchNorm2d(8))
    alone, images = copy.deepcopy(model), torch.randn(2, 3, 128, 128)
    GraphedModel(model, capture=Player())(images)
    alone(images)
    for (name, found), expected in zip(model.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_inference_is_not_captured() -> None:
    player = Player()
    graphed, images = GraphedModel(small_detr(), capture=player), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        graphed(images)
    graphed.eval()(images)
    assert player.captured == []
    graphed.train()(images)
    with torch.autocast("cpu", torch.bfloat16):
        graphed(images)
    assert len(player.captured) == 2  # one of them in bfloat16


def test_padding_to_a_multiple() -> None:
    batch = ImageBatch.of([torch.ones(3, 40, 64), torch.ones(3, 20, 10)])
    images, mask = pad_to_multiple(batch, 32)
    assert images.shape == (2, 3, 64, 64) and mask.shape == (2, 64, 64)
    assert torch.equal((~mask).sum((1, 2)), torch.tensor([40 * 64, 20 * 10]))
    assert torch.equal(images[:, 0] == 0, mask)


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="cuda_graph cannot be used here: CUDA graphs need a CUDA device, got cpu"):
        fit(small_detr(), small_criterion(), loader(ragged()), OptimConfig(cuda_graph=True))


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
