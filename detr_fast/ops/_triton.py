"""Whether Triton kernels can run here, and if not, why; imports Triton only where tensors are that it could run on."""

from __future__ import annotations

import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

# The first release whose kernels take tuples of numbers.
OLDEST = (3, 3)


@lru_cache(maxsize=1)
def why_not_importable() -> str | None:
    """Why Triton is of no use here, found out once; None where it is. Imports it."""
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:  # one of its libraries is missing, or it was built for another Python
        return f"triton does not load: {error}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {OLDEST[0]}.{OLDEST[1]} or later is needed, {version} is installed"
    return None


def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return "the Triton kernels are checked for CUDA, not for ROCm" if torch.version.hip else why_not_importable()
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":  # as Triton itself reads it
        return why_not_importable()
    return f"Triton needs a CUDA device, got {device.type}"


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which may be another than that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
