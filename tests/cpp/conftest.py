"""A fixture that compiles C++ for a test, which is skipped with a reason where nothing can."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Compile = Callable[..., Path]


@pytest.fixture(scope="session")
def cxx() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    return compiler


@pytest.fixture(scope="session")
def compile_cpp(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """compile_cpp(name, sources, *flags, root=ROOT) -> the binary; sources are relative to the root."""
    folder = tmp_path_factory.mktemp("cpp")

    def compile_it(name: str, sources: list[str], *flags: str, root: Path = ROOT) -> Path:
        binary = folder / name
        command = [cxx, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fopenmp-simd", "-ffp-contract=off", "-pthread"]
        command += [*flags, *(str(root / source) for source in sources), "-o", str(binary)]
        # The slowest takes two minutes of a free core.
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
        if "cannot find" in done.stderr and "-fsanitize" in " ".join(flags):
            pytest.skip(f"this compiler has no runtime for {' '.join(flags)}")
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return binary

    return compile_it
