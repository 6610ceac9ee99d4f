"""What a process that runs one model needs: seconds until its first answer, seconds a call, most resident memory.

``python -m benchmarks.inference_process`` prints a row for each way to run DETR-R50 on one image of 800x1066, with the
default malloc and with one that keeps freed memory, each in a process of its own. The model's file is written
beforehand: a checkpoint of PyTorch's, or an ONNX graph. Names of ways as arguments choose among them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
ALL = ("original", "detr_fast", "detr_fast-bf16", "onnxruntime", "openvino")
CALLS = 5


def load(way: str, folder: Path) -> Callable[[], Any]:
    """A model read from its file, and a call of it. The runtimes do without PyTorch."""
    import numpy as np

    image = np.random.default_rng(0).standard_normal((1, 3, 800, 1066), np.float32)
    if way == "onnxruntime":
        from onnxruntime import InferenceSession

        session = InferenceSession(folder / "model.onnx")
        return lambda: session.run(None, {"images": image})
    if way == "openvino":
        from openvino import Core

        request = Core().compile_model(folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda: request({0: image})
    return load_torch(way, folder, image)


def load_torch(way: str, folder: Path, image: Any) -> Callable[[], Any]:
    """The same for PyTorch."""
    import torch

    from benchmarks.original_model import OriginalDetr
    from detr_fast import detr_resnet50, optimize

    images = torch.from_numpy(image)
    file = folder / "model.pth"
    model: torch.nn.Module = OriginalDetr() if way == "original" else detr_resnet50(pretrained=file)
    if way == "original":
        model.load_state_dict(torch.load(file))
    more = [torch.zeros(1, *images.shape[2:], dtype=torch.bool)] if way == "original" else []
    if way != "original":
        model = optimize(model, dtype=torch.bfloat16 if way == "detr_fast-bf16" else None)
    return torch.inference_mode()(lambda: model.eval()(images, *more))


def measure(way: str, folder: Path) -> str:
    """This process's row; an import of this module is all that went before."""
    started = time.perf_counter()
    run = load(way, folder)
    seconds = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            first = time.perf_counter() - started
    peak = peak_resident_kib() / 1024
    return f"{first:>15.2f} {median(seconds[1:]):>9.3f} {peak:>10.0f}"


def peak_resident_kib() -> int:
    """Of this program alone: getrusage counts what the process was before it became this program."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def write_models(folder: Path) -> None:
    """The files that the processes read."""
    import torch

    from benchmarks.runtimes import model_of, onnx_graph
    from benchmarks.shapes import InferenceShape

    model = model_of(InferenceShape())
    torch.save(model.state_dict(), folder / "model.pth")
    (folder / "model.onnx").write_bytes(onnx_graph(model, torch.zeros(1, 3, 800, 1066)))


def main(ways: list[str]) -> None:
    """Write the models, run every way under both mallocs, print the table."""
    print(f"{'way':<16} {'malloc':<8} {'s to first call':>15} {'s a call':>9} {'peak MiB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for malloc, more in (("default", {}), ("tuned", TUNED)):
            for way in ways:
                command = [sys.executable, "-m", "benchmarks.inference_process", "--one", way, folder]
                run = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=True)
                print(f"{way:<16} {malloc:<8} {run.stdout.strip():>36}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(measure(sys.argv[2], Path(sys.argv[3])))
    else:
        main(sys.argv[1:] or list(ALL))
