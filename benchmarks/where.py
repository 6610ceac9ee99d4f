"""The device that the benchmarks run on, chosen before any of them is read: --benchmark-device."""

from __future__ import annotations

import torch

_chosen: list[torch.device] = []


def device() -> torch.device:
    """The chosen one, or else the GPU where there is one."""
    return _chosen[-1] if _chosen else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose(name: str) -> None:
    """Take a device, which must be there.

    Raises:
        ValueError: it is not.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--benchmark-device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    _chosen.append(torch.device(name))
