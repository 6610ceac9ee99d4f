"""Loads the native module ``detr_fast._C`` once, and remembers why it could not."""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

# Of the numbers that native code reads as they lie: enum detr_fast_dtype in csrc/core/dtype.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Native(NamedTuple):
    module: ModuleType | None
    why_not: str | None


@lru_cache(maxsize=1)
def load() -> Native:
    try:
        return Native(importlib.import_module("detr_fast._C"), None)
    except ModuleNotFoundError as error:
        if error.name != "detr_fast._C":
            raise
        return Native(None, "the native module was not built (a C++ compiler, and no DETR_FAST_NATIVE=off, builds it)")
    except ImportError as error:  # a library it links against is missing, or it was built for another Python
        warnings.warn(f"detr_fast runs without its native module, which does not load: {error}", stacklevel=2)
        return Native(None, f"the native module does not load: {error}")


def module() -> ModuleType:
    """The native module, where ``why_not`` gave no reason against it."""
    native = load()
    assert native.module is not None, native.why_not
    return native.module


def why_not(device: torch.device) -> str | None:
    """Why native code cannot run on this device; None where it can."""
    native = load()
    if native.module is None:
        return native.why_not
    if device.type == "cpu" or (device.type == "cuda" and native.module.cuda is not None and not torch.version.hip):
        return None
    if device.type == "cuda":
        return "the native module was built without CUDA (DETR_FAST_CUDA=on builds it where nvcc is)"
    return f"there is no native code for {device.type} devices"
