"""The counter-based generator of the C++, compiled by itself, against published answers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_philox_gives_the_published_answers(compile_cpp: Callable[..., Path]) -> None:
    binary = compile_cpp("philox_test", ["tests/cpp/philox_test.cpp"], "-O2", f"-I{ROOT}/csrc/core")
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
