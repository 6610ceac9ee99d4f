"""Checkpoints: foreign and broken files, full disks, other shapes."""

from __future__ import annotations

import argparse
import errno
import io
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detr_fast.checkpoint import (
    CheckpointError,
    WithoutRandomWeights,
    load_checkpoint,
    load_weights,
    prepare_output_folder,
    random_state,
    save_checkpoint,
    set_random_state,
)


class TinyDetr(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.input_proj = nn.Linear(4, 8)
        self.class_embed = nn.Linear(8, num_classes + 1)


class RunsCode:
    """Unpickling this with plain pickle creates the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def weights() -> dict[str, Tensor]:
    return TinyDetr().state_dict()


# ---- reading


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_reads_the_originals_file_with_a_pickled_namespace(tmp_path: Path, zip_format: bool) -> None:
    args = argparse.Namespace(hidden_dim=256, backbone="resnet50", dilation=False, frozen_weights=None, lr=1e-4)
    saved = {"model": weights(), "optimizer": {"state": {}}, "epoch": 499, "args": args}
    torch.save(saved, tmp_path / "c.pth", _use_new_zipfile_serialization=zip_format)

    checkpoint = load_checkpoint(tmp_path / "c.pth")

    assert checkpoint["args"] == vars(args)
    assert checkpoint["epoch"] == 499
    assert load_weights(TinyDetr(), checkpoint["model"]) == []


def test_namespace_is_allowed_for_this_file_only(tmp_path: Path) -> None:
    torch.save({"model": weights(), "args": argparse.Namespace(a=1)}, tmp_path / "c.pth")
    load_checkpoint(tmp_path / "c.pth")
    with pytest.raises(Exception, match="argparse.Namespace"):
        torch.load(tmp_path / "c.pth", weights_only=True)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, zip_format: bool) -> None:
    trap = tmp_path / "trap"
    torch.save(
        {"model": weights(), "args": RunsCode(trap)}, tmp_path / "c.pth", _use_new_zipfile_serialization=zip_format
    )
    with pytest.raises(CheckpointError, match=r"c\.pth is refused: it holds a pickled \w+\.mkdir"):
        load_checkpoint(tmp_path / "c.pth")
    assert not trap.exists()


def test_a_trap_inside_a_namespace_is_refused_too(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"model": weights(), "args": argparse.Namespace(lr=RunsCode(trap))}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint(tmp_path / "c.pth")
    assert not trap.exists()


def test_reads_bare_state_dict_and_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    torch.save(weights(), tmp_path / "bare.pth")
    safetensors.save_file(weights(), tmp_path / "w.safetensors")
    for name in ("bare.pth", "w.safetensors"):
        checkpoint = load_checkpoint(tmp_path / name)
        assert checkpoint["args"] == {}
        assert load_weights(TinyDetr(), checkpoint["model"]) == []


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_truncated_file(tmp_path: Path, keep: float, zip_format: bool) -> None:
    buffer = io.BytesIO()
    torch.save({"model": weights(), "epoch": 1}, buffer, _use_new_zipfile_serialization=zip_format)
    contents = buffer.getvalue()
    (tmp_path / "c.pth").write_bytes(contents[: int(len(contents) * keep)])
    with pytest.raises(CheckpointError, match=r"c\.pth is truncated or damaged"):
        load_checkpoint(tmp_path / "c.pth")


def test_truncated_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    contents = safetensors.save(weights())
    (tmp_path / "w.safetensors").write_bytes(contents[:-7])
    with pytest.raises(CheckpointError, match=r"w\.safetensors is truncated or damaged"):
        load_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is text\n", "is not a checkpoint.*b'hello, this is"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"\x80\x02 then rubbish", "is truncated or damaged"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, contents: bytes, message: str) -> None:
    (tmp_path / "c.pth").write_bytes(contents)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "c.pth")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"epoch": 3, "state": {}}, r"no key 'model'; its keys are \['epoch', 'state'\]"),
        ([1, 2], "holds a list, expected a dict"),
        ({}, "no key 'model'"),
        ({"model": {}}, "'model' must be a non-empty dict"),
        ({"model": [1]}, "'model' must be a non-empty dict"),
    ],
)
def test_no_weights_in_it(tmp_path: Path, saved: Any, message: str) -> None:
    torch.save(saved, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "c.pth")


# ---- writing


def test_round_trip_leaves_no_other_file(tmp_path: Path) -> None:
    contents = {"model": weights(), "epoch": 2, "args": {"lr": 1e-4}, "categories": {1: "cat"}, "ema": None}
    save_checkpoint(contents, tmp_path / "c.pth")
    save_checkpoint({**contents, "epoch": 3}, tmp_path / "c.pth")
    checkpoint = load_checkpoint(tmp_path / "c.pth")
    assert checkpoint["epoch"] == 3
    assert checkpoint["categories"] == {1: "cat"}
    assert os.listdir(tmp_path) == ["c.pth"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "c.pth").symlink_to(tmp_path / "real" / "c.pth")
    save_checkpoint({"model": weights()}, tmp_path / "c.pth")
    assert (tmp_path / "c.pth").is_symlink()
    assert load_checkpoint(tmp_path / "real" / "c.pth")["args"] == {}


class FillsUp(io.FileIO):
    """A file on a disk with room for 1000 bytes."""

    def write(self, chunk: Any) -> int:
        if self.tell() + memoryview(chunk).nbytes > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(chunk)


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint({"model": weights(), "epoch": 1}, tmp_path / "c.pth")
    monkeypatch.setattr(Path, "open", lambda self, mode: FillsUp(self, mode))
    with pytest.raises(CheckpointError, match=r"c\.pth could not be written, what was there is kept: No space left"):
        save_checkpoint({"model": weights(), "epoch": 2}, tmp_path / "c.pth")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "c.pth")["epoch"] == 1
    assert os.listdir(tmp_path) == ["c.pth"]


def _save_under_a_size_limit(folder: str) -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails with EFBIG, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    save_checkpoint({"model": {"w": torch.zeros(100_000)}, "epoch": 2}, Path(folder) / "c.pth")


def test_a_file_size_limit_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """The same with a real refusal of the operating system, in a process of its own."""
    save_checkpoint({"model": weights(), "epoch": 1}, tmp_path / "c.pth")
    code = "import sys; from test_checkpoint import _save_under_a_size_limit as f; f(sys.argv[1])"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "c.pth could not be written, what was there is kept: File too large" in ended.stderr
    assert load_checkpoint(tmp_path / "c.pth")["epoch"] == 1
    assert os.listdir(tmp_path) == ["c.pth"]


def test_an_interrupt_while_saving_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"model": weights()}, tmp_path / "c.pth")
    assert os.listdir(tmp_path) == []


def test_output_folder(tmp_path: Path) -> None:
    assert prepare_output_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="output folder .*file cannot be written"):
        prepare_output_folder(tmp_path / "file")
    with pytest.raises(CheckpointError, match="output folder .*inside cannot be written"):
        prepare_output_folder(tmp_path / "file" / "inside")
    if Path("/proc").is_dir():
        with pytest.raises(CheckpointError, match="output folder /proc cannot be written"):
            prepare_output_folder("/proc")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_output_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
        prepare_output_folder(tmp_path)


# ---- loading into a model


def test_class_head_of_another_size() -> None:
    saved, model = TinyDetr(91).state_dict(), TinyDetr(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"class_embed\.weight: .*\[4, 8\], the checkpoint has \[92, 8\]; --reset-class-head"
    ):
        load_weights(model, saved)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    assert load_weights(model, saved, reset_class_head=True) == ["class_embed.weight", "class_embed.bias"]
    assert torch.equal(model.state_dict()["class_embed.weight"], before["class_embed.weight"])
    assert torch.equal(model.state_dict()["input_proj.weight"], saved["input_proj.weight"])


def test_weights_are_random_again_after_a_model_without() -> None:
    before = torch.get_rng_state()
    with WithoutRandomWeights():
        nn.init.xavier_uniform_(nn.Linear(3, 3).weight)
        nn.init.kaiming_normal_(nn.Conv2d(3, 3, 1).weight)
        nn.init.zeros_(zeros := nn.Embedding(2, 3).weight)
    assert torch.equal(torch.get_rng_state(), before) and not zeros.any()
    assert not torch.equal(nn.Linear(3, 3).weight, nn.Linear(3, 3).weight)


def test_reset_also_drops_a_head_of_equal_size() -> None:
    model = TinyDetr()
    before = model.class_embed.weight.clone()
    load_weights(model, TinyDetr().state_dict(), reset_class_head=True)
    assert torch.equal(model.class_embed.weight, before)


def test_missing_unknown_and_misshapen_keys() -> None:
    saved = weights()
    bias = saved.pop("input_proj.bias")
    with pytest.raises(CheckpointError, match="lacks 1 .*input_proj.bias"):
        load_weights(TinyDetr(), saved)
    with pytest.raises(CheckpointError, match="has unknown 1 .*other"):
        load_weights(TinyDetr(), {**saved, "input_proj.bias": bias, "other": bias})
    with pytest.raises(CheckpointError, match=r"input_proj\.bias: .*expects shape \[8\], the checkpoint has \[3\]$"):
        load_weights(TinyDetr(), {**saved, "input_proj.bias": torch.zeros(3)})


def test_batch_norm_counters_are_optional() -> None:
    extra = {"bn.num_batches_tracked": torch.tensor(3)}
    assert load_weights(TinyDetr(), {**weights(), **extra}) == []


def test_random_state_comes_back_through_a_file(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random(), float(np.random.randn())

    draw()
    save_checkpoint({"model": weights(), "random_state": random_state()}, tmp_path / "c.pth")
    first = draw()
    assert draw() != first
    set_random_state(load_checkpoint(tmp_path / "c.pth")["random_state"])
    assert draw() == first
