"""Training with a compiled model and with recomputed activations."""

from __future__ import annotations

import copy
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
from detr_fast import train as train_module
from detr_fast import train_forward as module
from detr_fast.cli import app
from detr_fast.config import OptimConfig, TrainConfig
from detr_fast.fit import fit
from detr_fast.train_forward import train_forward, why_not_compiled

CPU = torch.device("cpu")
# Of three sizes, two of which are one when padded to multiples of 64.
SIDES = (32, 48, 96)


def ragged(seed: int = 0) -> list[tuple[Tensor, dict[str, Tensor]]]:
    torch.manual_seed(seed)
    return [sample for side in SIDES for sample in samples([2, 1], side)]


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
