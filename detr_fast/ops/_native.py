"""Loads the native module ``detr_fast._C`` once, and remembers why it could not."""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch

# Of the numbers that native code reads as they lie: enum detr_fast_dtype in csrc/core/dtype.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Native(NamedTuple):
    """The native module, or why there is none.

    Attributes:
        module, why_not: one of them is None.
        quick: the ops' usual calls on the CPU in one step of native code each, see csrc/quick_calls.h. They return None
            for every other call, and the ordinary way then does what is to be done. To look at a tensor and to make one
            takes 5 microseconds from Python, and 0.5 by the functions that recent releases of torch hand out for native
            code: there are no quick calls with an older torch.
    """

    module: ModuleType | None
    why_not: str | None
    quick: SimpleNamespace | None = None


@lru_cache(maxsize=1)
def load() -> Native:
    try:
        native = importlib.import_module("detr_fast._C")
    except ModuleNotFoundError as error:
        if error.name != "detr_fast._C":
            raise
        return Native(None, "the native module was not built (a C++ compiler, and no DETR_FAST_NATIVE=off, builds it)")
    except ImportError as error:  # a library it links against is missing, or it was built for another Python
        warnings.warn(f"detr_fast runs without its native module, which does not load: {error}", stacklevel=2)
        return Native(None, f"the native module does not load: {error}")
    return Native(native, None, _quick_calls(native))


def _quick_calls(native: ModuleType) -> SimpleNamespace | None:
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return None
    return SimpleNamespace(
        **native.make_quick_calls(torch.Tensor, exchange, torch.get_num_threads, _new_memory_is_filled)
    )


def _new_memory_is_filled() -> bool:
    """Whether torch.empty fills what it returns, so that memory which nobody writes shows."""
    # A property of the module, which its type does not tell.
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return torch.are_deterministic_algorithms_enabled() and bool(fills)


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
