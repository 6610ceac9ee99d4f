"""Every CUDA source compiles for every architecture, and its kernels keep to a budget of registers without spilling."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# 128 registers leave 16 warps on a multiprocessor, which is more than shared memory leaves room for at DETR sizes.
REGISTER_BUDGET = 128

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def nvcc(source: Path, output: Path, *flags: str) -> str:
    command = [str(NVCC), "-std=c++17", "-O3", "-Werror", "all-warnings", *flags, str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_machine_code_keeps_to_its_budget(source: Path, tmp_path: Path) -> None:
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    report = nvcc(source, tmp_path / "object.o", "-c", "-Xptxas", "-v", *codes)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    kernels = len(re.findall(r"Compiling entry function", report))
    assert kernels > 0
    assert kernels % len(codes) == 0
    assert len(registers) == kernels
    assert len(spilled) == 2 * len(re.findall(r"Function properties", report))  # of kernels and what they call
    assert max(registers) <= REGISTER_BUDGET, report
    assert max(spilled) == 0, report


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_ptx_for_later_gpus(source: Path, tmp_path: Path) -> None:
    nvcc(source, tmp_path / "kernels.ptx", "-ptx", "-arch=compute_90")
    ptx = (tmp_path / "kernels.ptx").read_text()
    assert ".target sm_90" in ptx
    assert f"{source.stem}_kernel" in ptx
