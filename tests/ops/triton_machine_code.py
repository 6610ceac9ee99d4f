"""Machine code of Triton kernels without a GPU.

The launches of a call on CPU tensors are recorded instead of run, and what they would have compiled on an A100 (sm_80)
or an H100 (sm_90) is compiled. And the checks of a kernel under Triton's interpreter, in a process of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from detr_fast.ops import _triton

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90)
NO_TRITON = _triton.why_not_importable()
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# The interpreter has to be chosen before kernels are imported.
INTERPRETER_OR_GPU = pytest.mark.parametrize(
    "interpreter", ["1", pytest.param("0", marks=needs_gpu)], ids=["interpreter", "gpu"]
)


def run_checks(checks: Path, interpreter: str) -> None:
    """Run a file of tests under Triton's interpreter ("1") or on a GPU ("0"); all have to pass, and none to skip."""
    environment = os.environ | {"TRITON_INTERPRET": interpreter}
    if interpreter == "1":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout) and "skipped" not in done.stdout


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Recorder:
    """In a kernel's place: notes launches instead of running them."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return lambda *arguments, **constants: self.launches.append(Launch(self.kernel, arguments, constants))


def record_launches(monkeypatch: pytest.MonkeyPatch, module: Any, *kernels: str) -> list[Launch]:
    """Have a module's kernels note their launches in a list instead of running."""
    launches: list[Launch] = []
    for name in kernels:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    return launches


def specialization(launch: Launch, backend: Any) -> dict[str, tuple[Any, Any]]:
    """Of every argument: its type, and the constant or the property that a kernel is compiled for."""
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, special, _ = binder(*launch.arguments, **launch.constants)
    return dict(zip(bound, special, strict=True))


def backend_of(architecture: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget("cuda", architecture, 32))


def compile_launch(launch: Launch, architecture: int) -> Any:
    import triton
    from triton.compiler import ASTSource

    backend = backend_of(architecture)
    special = list(specialization(launch, backend).items())
    constants = {(i,): value for i, (_, (kind, value)) in enumerate(special) if kind == "constexpr"}
    attributes = {
        (i,): backend.parse_attr(value)
        for i, (_, (kind, value)) in enumerate(special)
        if kind != "constexpr" and isinstance(value, str)
    }
    source = ASTSource(launch.kernel, {name: kind for name, (kind, _) in special}, constants, attributes)
    options = {name: value for name, value in launch.constants.items() if name not in launch.kernel.arg_names}
    return triton.compile(source, target=backend.target, options=options)


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers, and bytes of memory: STACK and LOCAL are where spilled registers go."""
    import triton.backends.nvidia

    shipped = Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump"
    tool = str(shipped) if shipped.is_file() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("needs cuobjdump, which this Triton does not ship")
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([tool, "-res-usage", str(binary)], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    assert set(found) == {"REG", "STACK", "SHARED", "LOCAL"}, report
    return found
