"""Finds what would make the host wait for a GPU, on a machine without one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Each hands a value of the tensor to Python, or a copy of it to the host.
METHODS = ("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "__array__")
METHODS += ("__bool__", "__int__", "__float__", "__index__", "__contains__")
# Operators whose result's shape or value the host has to know. An index of booleans is looked for apart.
OPERATORS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique",
    "_unique2",
    "unique_dim",
)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class Wait(AssertionError):
    """Something would have waited for the device."""


class _Operators(TorchDispatchMode):
    def __init__(self, exempt: frozenset[str]) -> None:
        super().__init__()
        self.exempt = exempt

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if (name in OPERATORS or (name in INDEXING and _has_booleans(args[1]))) and not _called_by(self.exempt):
            raise Wait(f"aten::{name} on {[tuple(x.shape) for x in args if isinstance(x, Tensor)]}")
        return func(*args, **(kwargs or {}))


def _has_booleans(indices: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _called_by(functions: frozenset[str]) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in functions:
            return True
        frame = frame.f_back
    return False


@contextmanager
def no_waits(*exempt: str) -> Iterator[None]:
    """Raise Wait at whatever would wait, but for what is called by functions of these names.

    Forward and backward of the calling thread; tensors may lie anywhere.
    """
    names = frozenset(exempt)

    def guarded(name: str) -> Any:
        original = getattr(Tensor, name)

        def method(self: Tensor, *arguments: Any, **options: Any) -> Any:
            if not _called_by(names):
                raise Wait(f"Tensor.{name} on {tuple(self.shape)}")
            return original(self, *arguments, **options)

        return method

    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, guarded(name)))
        stack.enter_context(_Operators(names))
        # In this thread, so that the guard sees backward too.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield
