"""The package as it installs: with native code, without, and where the compiler is broken."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from detr_fast.ops import _native

ROOT = Path(__file__).parents[1]
SHIPPED = ["pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md", "csrc", "detr_fast"]
has_compiler = shutil.which(os.environ.get("CXX", "c++")) is not None
nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_compiler = pytest.mark.skipif(not has_compiler, reason="needs a C++ compiler")
needs_build_tools = pytest.mark.skipif(
    shutil.which("cmake", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}") is None
    or importlib.util.find_spec("pybind11") is None,
    reason="needs cmake and pybind11, which the test extra installs",
)


@pytest.fixture()
def source(tmp_path: Path) -> Path:
    """A copy of what is packaged, without what was built in place."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        "wheels",
        ".",
    ]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("DETR_FAST_")} | environment
    return subprocess.run(
        command,
        cwd=source,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=170,
        check=False,
    )


def run_installed(source: Path, code: str) -> str:
    """Runs code against the wheel that was built, and nothing else of this package."""
    (wheel,) = (source / "wheels").glob("*.whl")
    installed = source.parent / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    # An editable install of this package adds a finder that would find its native module for ours.
    check = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
    )
    check += f"import detr_fast; assert detr_fast.__file__.startswith({str(installed)!r}), detr_fast.__file__\n"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", check + code],
        cwd=source.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


EVERY_OP = """
import numpy as np
import torch
from detr_fast.info import OPS, collect_info
from detr_fast.ops import *

logits, boxes = torch.tensor([[[[0.0, 9.0], [9.0, 0.0], [0.0, 9.0]]]]), torch.full((1, 1, 3, 4), 0.5)  # [L, B, Q, ...]
targets = PackedTargets(torch.tensor([0]), torch.full((1, 4), 0.5), [1])
costs = torch.tensor([[[2.0, 1.0], [1.0, 3.0], [5.0, 5.0]]])
tokens, offsets = torch.ones(3, 1, 16), TokenOffsets.of([1, 2], "cpu")
masks = torch.stack([torch.eye(2), 1 - torch.eye(2)])
places = Places.of(np.arange(2), 2, 2)
maps, packed = torch.ones(1, 2, 6, 6), PackedConv.of(torch.ones(1, 2, 1, 1), None)
stage = PackedBlocks([PackedBlock((PackedConv.of(torch.ones(2, 2, 1, 1)),) * 2)])
in_bytes = PackedConvInt8.of(torch.full((1, 2, 1, 1), 127.0), x=Steps(1 / 127))
linear, norm = PackedConv.of(torch.zeros(4, 4, 1, 1), torch.zeros(4)), Norm(torch.ones(4), torch.ones(4), 1e-5)
both = PackedConv.of(torch.zeros(8, 4, 1, 1), torch.zeros(8))
layer = DecoderLayer(both, linear, linear, norm, linear, linear, norm, linear, linear, norm)
layers = TransformerLayers(1, (), (layer,), linear, linear, norm)
block = FrozenConv(torch.ones(2, 2, 1, 1), torch.ones(2), torch.zeros(2))
runs = {
    "add_layer_norm": lambda: bool((add_layer_norm(tokens[0], -tokens[0], torch.ones(16), torch.ones(16)) == 1).all()),
    "relu_dropout": lambda: relu_dropout(masks - 1, Dropout(0.5, torch.tensor([7]))).count_nonzero() == 0,
    "set_loss": lambda: abs(set_loss(logits, boxes, targets, torch.tensor([[1]]), num_boxes=1).loss_giou.item()) < 1e-6,
    "mask_loss": lambda: mask_loss(50 * masks - 25, [masks.bool()]).mask.amax().item() < 1e-6,
    "mask_argmax": lambda: mask_argmax(masks, places, places).tolist() == [[0, 1], [1, 0]],
    "mask_threshold": lambda: mask_threshold(masks, places, places, 0.5).tolist() == masks.long().tolist(),
    "conv": lambda: conv(maps, packed).flatten().tolist() == [2.0] * 36,
    "conv_blocks": lambda: conv_blocks(maps, stage).flatten().tolist() == [5.0] * 72,
    "conv_int8": lambda: conv_int8(maps.byte(), in_bytes).flatten().tolist() == [2.0] * 36,
    "conv_max_pool": lambda: conv_max_pool(maps, packed).flatten().tolist() == [2.0] * 9,
    "residual_block": lambda: residual_block(maps, [block]).flatten().tolist() == [3.0] * 72,
    "transformer_layers": lambda: bool((transformer_layers(*[torch.ones(3, 4)] * 3, layers, offsets)[0] == 1).all()),
    "set_criterion": lambda: abs(set_criterion(logits, boxes, targets, num_boxes=1).losses.loss_giou.item()) < 1e-6,
    "attention": lambda: bool((attention(tokens, tokens, tokens, offsets, offsets) == 1).all()),
    "assignment": lambda: assignment(costs, [2]).tolist() == [[1, 0]],
    "auction": lambda: assignment(costs, [2], method="auction").tolist() == [[1, 0]],
    "matching": lambda: matching(logits, boxes, targets).query_of_target.tolist() == [[1]],
    "matching_cost": lambda: matching_cost(logits, boxes, targets).cost.argmin().item() == 1,
}
assert {op.name for op in OPS} == set(runs), "this test runs every op"
assert all(run() for run in runs.values())
# PyTorch's own attention is there without any of ours, and the criterion is composed of other ops.
print({selections["cpu"]["takes"] for selections in collect_info()["ops"].values()} - {"sdpa", "composed"})
"""


def test_pure_python_install_runs_every_op_on_its_reference(source: Path) -> None:
    done = build_wheel(source, DETR_FAST_NATIVE="off")
    assert done.returncode == 0, done.stdout
    (wheel,) = (source / "wheels").glob("*.whl")
    assert wheel.name == "detr_fast-0.1.0-py3-none-any.whl"
    assert "detr_fast/py.typed" in zipfile.ZipFile(wheel).namelist()
    assert run_installed(source, EVERY_OP).strip() == "{'reference'}"


@needs_build_tools
@needs_compiler
def test_native_install(source: Path) -> None:
    done = build_wheel(source, DETR_FAST_CUDA="off")
    assert done.returncode == 0, done.stdout
    assert run_installed(source, EVERY_OP).strip() == "{'native'}"
    assert run_installed(source, "from detr_fast import _C; print(_C.cuda)").strip() == "None"


@pytest.mark.skipif(_native.load().module is None, reason="needs the native module in the checkout")
def test_the_native_module_needs_neither_torch_nor_cuda_to_load() -> None:
    if shutil.which("ldd") is None:
        pytest.skip("needs ldd")
    libraries = subprocess.run(["ldd", _native.module().__file__], capture_output=True, text=True, check=True).stdout
    assert "libc" in libraries
    assert "torch" not in libraries, "one binary serves every torch version"
    assert "cuda" not in libraries, "the module imports where no CUDA is installed"


@needs_build_tools
class TestFailingBuild:
    @needs_compiler
    def test_an_error_in_the_source_fails_with_the_compilers_message(self, source: Path) -> None:
        for path in (source / "csrc").rglob("*.cpp"):  # all of them, so that none takes long
            path.write_text("#error no such luck\n" + path.read_text())
        done = build_wheel(source, DETR_FAST_CUDA="off")
        assert done.returncode != 0
        assert "bindings.cpp:1:2: error: #error no such luck" in done.stdout
        assert "DETR_FAST_NATIVE=off without any native code" in done.stdout

    def test_a_broken_compiler_fails_with_its_message(self, source: Path, fake_compiler: Callable[[str], str]) -> None:
        done = build_wheel(source, CXX=fake_compiler("cannot execute cc1plus"), DETR_FAST_CUDA="off")
        assert done.returncode != 0
        assert "cannot execute cc1plus" in done.stdout

    @needs_compiler
    def test_a_broken_nvcc_fails_too(self, source: Path, fake_compiler: Callable[[str], str]) -> None:
        done = build_wheel(source, CUDACXX=fake_compiler("unsupported GNU version"))
        assert done.returncode != 0
        assert "unsupported GNU version" in done.stdout

    @pytest.fixture()
    def fake_compiler(self, tmp_path: Path) -> Callable[[str], str]:
        def make(message: str) -> str:
            path = tmp_path / "fake_compiler"
            path.write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 1\n")
            path.chmod(0o755)
            return str(path)

        return make


def test_cuda_can_be_demanded(source: Path) -> None:
    if nvcc is not None:
        pytest.skip("needs a machine without nvcc")
    done = build_wheel(source, DETR_FAST_CUDA="on")
    assert done.returncode != 0
    assert "DETR_FAST_CUDA=on, but nvcc is neither in" in done.stdout


@pytest.mark.parametrize(
    ("variable", "allowed"), [("DETR_FAST_NATIVE", "on, off"), ("DETR_FAST_CUDA", "auto, on, off")]
)
def test_a_word_that_means_nothing_is_refused(source: Path, variable: str, allowed: str) -> None:
    done = build_wheel(source, **{variable: "maybe"})
    assert done.returncode != 0
    assert f"{variable} must be one of {allowed}, got 'maybe'" in done.stdout
