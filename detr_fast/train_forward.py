"""How the training loop calls its model: as it is, on several processes, or compiled."""

from __future__ import annotations

import os
import shutil
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detr_fast.config import OptimConfig
from detr_fast.distributed import is_distributed
from detr_fast.ops import _triton


def train_forward(model: nn.Module, options: OptimConfig, device: torch.device) -> nn.Module:
    """What to call in place of ``model``, with the same parameters.

    Raises:
        ValueError: ``options`` ask for what cannot be done here; the message says why.
    """
    # One device per process, so inputs need no scattering.
    forward: nn.Module = DistributedDataParallel(model) if is_distributed() else model
    if options.compile:
        reason = why_not_compiled(device)
        if reason is not None:
            raise ValueError(f"compile cannot be used here: {reason}")
        return torch.compile(forward)  # type: ignore[return-value]
    return forward


def why_not_compiled(device: torch.device) -> str | None:
    """What ``torch.compile`` lacks for this device; None where it lacks nothing."""
    if device.type == "cuda":
        reason = _triton.why_not(device)
        return None if reason is None else f"torch.compile makes Triton kernels, and {reason}"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch chooses it
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and {compiler!r} is not found (CXX names another)"
    return None
