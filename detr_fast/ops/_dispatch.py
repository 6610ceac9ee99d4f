"""Picks the implementation that an op takes, and says why another one cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``why_not`` takes the tensors of a call and returns the reason why this implementation cannot run them, or None
    where it can. It reads metadata only.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]


@dataclass(frozen=True)
class Op:
    """An op and its implementations, the fastest first; the last one, the reference, runs everything.

    ``example`` gives tensors of a typical call on a device, to ask what would run there.
    """

    name: str
    implementations: tuple[Implementation, ...]
    example: Callable[[torch.device], tuple[Tensor, ...]]

    def choose(self, backend: str | None, *tensors: Tensor) -> Implementation:
        """The implementation called ``backend``, or the fastest that can run these tensors where it is None.

        Raises:
            ValueError: there is no implementation of that name.
            NotImplementedError: it cannot run these tensors; the message says why.
        """
        if backend is None:
            for implementation in self.implementations:
                if implementation.why_not(*tensors) is None:
                    return implementation
        chosen = next((i for i in self.implementations if i.name == backend), None)
        if chosen is None:
            names = ", ".join(repr(i.name) for i in self.implementations)
            raise ValueError(f"backend of {self.name} must be None or one of {names}, got {backend!r}")
        reason = chosen.why_not(*tensors)
        if reason is not None:
            raise NotImplementedError(f"{self.name} cannot run with backend={backend!r}: {reason}")
        return chosen

    def reasons(self, device: torch.device) -> dict[str, str | None]:
        """For every implementation, why it cannot run on ``device``; None where it can."""
        tensors = self.example(device)
        return {i.name: i.why_not(*tensors) for i in self.implementations}


def name_chooser(op: Op) -> Callable[[str | None, Tensor], str]:
    """A function (backend, tensor) to the name of the implementation, which torch.compile may call, too."""

    def at_compile_time(backend: str | None, device: str) -> str:
        return op.choose(backend, torch.empty(0, device=device)).name

    # So that torch.compile need not follow how the native module is loaded. It is what the decorator
    # torch.compiler.assume_constant_result does, which imports the whole compiler, half a second and Triton with it.
    at_compile_time._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def name_of_chosen(backend: str | None, tensor: Tensor) -> str:
        if torch.compiler.is_compiling():
            return at_compile_time(backend, str(tensor.device))
        return op.choose(backend, tensor).name

    return name_of_chosen


def always_runs(*tensors: Tensor) -> None:
    """The ``why_not`` of a reference."""


def goes_through_dispatcher(tensor: Tensor) -> bool:
    """Whether torch must see the op as one node: it is compiled or exported, or the tensor is a subclass (a fake one).

    Otherwise a public function calls its implementation directly, which costs a tenth of the dispatcher's path.
    """
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def refuse_padded_targets(op: str, tensor: Tensor) -> None:
    """Raise NotImplementedError where torch must see the op as one node: schemas have counts on the host."""
    if goes_through_dispatcher(tensor):
        raise NotImplementedError(f"{op} of PaddedTargets cannot be compiled or exported: it takes PackedTargets there")
