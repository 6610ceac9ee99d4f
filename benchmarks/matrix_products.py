"""The floor under a whole network: as many operations in products of matrices of a size where a machine is quickest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Contestant

SIDE = 2048


def flops_of(run: Callable[[], object]) -> int:
    """Operations of a call, a multiplication and an addition being two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def floor(flops: int, device: torch.device | str = "cpu") -> Contestant:
    """So many operations."""
    return Contestant("floor: matrix products", partial(multiply, flops, torch.randn(SIDE, SIDE, device=device)))


def multiply(flops: int, square: Tensor) -> None:
    """The last product is of as many rows as are left."""
    rows = flops // (2 * square.numel())
    for start in range(0, rows, len(square)):
        square[: rows - start] @ square
