"""How the training loop calls its model: as it is, on several processes, compiled, or as CUDA graphs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detr_fast.config import OptimConfig
from detr_fast.data.batch import ImageBatch
from detr_fast.distributed import is_distributed
from detr_fast.ops import _triton

# Pixels. Neither number is measured yet: finer sizes compute on less padding and are more to capture, and every graph
# has its own gradients, 160 MB of a DETR with ResNet-50.
GRAPH_MULTIPLE = 128
MOST_GRAPHS = 16

Capture = Callable[[nn.Module, tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], dict[str, Any]]]


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
    if options.cuda_graph:
        reason = why_not_graphed(device)
        if reason is not None:
            raise ValueError(f"cuda_graph cannot be used here: {reason}")
        return GraphedModel(model)
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


def why_not_graphed(device: torch.device) -> str | None:
    """What keeps a model from being captured; None where nothing does."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, got {device.type}"
    return "a captured model does not average gradients over processes" if is_distributed() else None


class GraphedModel(nn.Module):
    """Runs a model's forward and its backward pass as CUDA graphs: one launch each, in place of thousands.

    A graph is of one size, so images are padded to multiples of ``multiple`` pixels, and each size is captured when it
    first comes. From ``most`` sizes on, further ones run as without graphs. Padding is computed on, for a graph cannot
    depend on how much there is; outputs do not depend on it.

    Matching and losses stay outside, for the number of targets, which the host knows and a graph would keep, differs
    from batch to batch; so does the optimizer, which is a handful of launches. Dropout draws from torch's generator,
    whose state graphs advance, so that every replay drops other elements.

    The outputs and the gradients that a call gives are overwritten by the next. **It has not run on a GPU yet**: its
    tests put a stand-in in place of the capture.

    Args:
        model: ``ImageBatch`` to tensors, nested in dicts, lists and tuples; without gradient hooks and host waits.
        capture: makes the graphs of a module and its arguments: ``capture_with_cuda``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        multiple: int = GRAPH_MULTIPLE,
        most: int = MOST_GRAPHS,
        capture: Capture | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.multiple, self.most = multiple, most
        self.capture = capture or capture_with_cuda
        self.graphs: dict[tuple[Any, ...], Callable[[Tensor, Tensor], dict[str, Any]]] = {}

    def forward(self, samples: Any) -> Any:
        """As the model's, in training with gradients; elsewhere it is the model's."""
        batch = ImageBatch.of(samples)
        if not (self.training and torch.is_grad_enabled()):
            return self.model(batch)
        images, mask = pad_to_multiple(batch, self.multiple)
        key = (tuple(images.shape), images.dtype, torch.is_autocast_enabled(images.device.type))
        if key not in self.graphs and len(self.graphs) < self.most:
            self.graphs[key] = self._captured(images, mask)
        graph = self.graphs.get(key)
        return self.model(batch) if graph is None else graph(images, mask)

    def _captured(self, images: Tensor, mask: Tensor) -> Callable[[Tensor, Tensor], dict[str, Any]]:
        # The calls that warm up must not be seen in the statistics of a batch norm.
        before = [buffer.clone() for buffer in self.model.buffers()]
        graph = self.capture(_OfTensors(self.model).train(), (images.clone(), mask.clone()))
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)
        return graph


class _OfTensors(nn.Module):
    """The model as a function of tensors; a module of its own for each graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor) -> Any:
        # Without sizes: the host must not decide by them what is captured.
        return self.model(ImageBatch(images, mask))


def capture_with_cuda(
    module: nn.Module, arguments: tuple[Tensor, Tensor]
) -> Callable[[Tensor, Tensor], dict[str, Any]]:
    """Forward and backward pass in one graph each, after three calls that warm up."""
    return torch.cuda.make_graphed_callables(module, arguments)  # type: ignore[return-value]


def pad_to_multiple(batch: ImageBatch, multiple: int) -> tuple[Tensor, Tensor]:
    """Images and mask in a frame whose sides are multiples of ``multiple``."""
    height, width = (-side % multiple for side in batch.images.shape[-2:])
    frame = (0, width, 0, height)
    return nn.functional.pad(batch.images, frame), nn.functional.pad(batch.mask, frame, value=True)
