"""A model's forward pass as CUDA graphs, for inference: one launch for each size of batch, in place of hundreds."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.cuda_graphs import GraphPool
from detr_fast.data.batch import ImageBatch
from detr_fast.models.segmentation import DetrSegm, QueryMasks

# Each size seen once is remembered, to know it when it comes again; beyond so many, memory begins anew.
MOST_REMEMBERED = 4096

Run = Callable[[Tensor, Tensor], Any]
Capture = Callable[[Run, Tensor, Tensor], Callable[[], Any]]

_as_it_is = ContextVar("without graphs", default=False)


@dataclass(frozen=True)
class GraphSizes:
    """Which batches share a graph.

    Attributes:
        multiple: images are padded to multiples of so many pixels. 1: not at all, so that answers are the model's;
            more: fewer graphs, and answers change a little, as by the padding of a batch.
        most: how many sizes get a graph: the first ones that come twice. Others run as without graphs. All graphs
            share the memory for what lies between input and output, which is that of the largest.

    Raises:
        ValueError: a number is not positive.
    """

    multiple: int = 1
    most: int = 16

    def __post_init__(self) -> None:
        for name in ("multiple", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class GraphedForward:
    """Takes the place of ``model.forward``.

    A size is captured when it comes the second time. A call copies its images into the graph's memory, launches the
    graph, and copies the outputs out of it, so that they are the caller's. Calls of several threads take turns. A model
    that was moved is captured anew. Copies and pickles have no graphs yet.

    Images on another kind of device, gradients, training mode, and calls within ``without_graphs`` go to the model as
    it is. Hooks of the model's modules are not called by a graph. **It has not run on a GPU yet, and its speed is not
    measured**: its tests put a stand-in in place of the capture.

    Args:
        model: images to nested dicts, lists and tuples of tensors and ``QueryMasks``; it may not wait for the device.
        sizes: which batches share a graph.
        capture: makes what turns a function of two tensors, and these, into one that does the same with whatever the
            tensors then hold: ``CudaCapture``.
        device_type: of images that are captured.

    Raises:
        ValueError: images are to be padded for a model with masks, which are of the padded images.
    """

    def __init__(
        self,
        model: nn.Module,
        sizes: GraphSizes | None = None,
        *,
        capture: Callable[[], Capture] | None = None,
        device_type: str = "cuda",
    ) -> None:
        self.sizes = sizes or GraphSizes()
        if self.sizes.multiple > 1 and any(isinstance(module, DetrSegm) for module in model.modules()):
            raise ValueError(f"multiple must be 1 for a model with masks, got {self.sizes.multiple}")
        self.model = model
        self.capture: Callable[[], Capture] = capture or CudaCapture
        self.device_type = device_type
        self.__signature__ = inspect.signature(model.forward)  # what ``detect`` looks at
        self._graphs = _Graphs(self.capture())

    def __call__(self, samples: Any, **options: Any) -> Any:
        """As the model's ``forward``; its options are part of what a graph is of."""
        batch = ImageBatch.of(samples)
        if not self._captures(batch):
            return self._forward(samples, options)
        batch = framed(batch, self.sizes.multiple)
        with self._turn(batch.images.device):
            graph = self._graph(batch, options)
            if graph is not None:
                return graph(batch.images, batch.mask)
        return self._forward(batch, options)

    def _captures(self, batch: ImageBatch) -> bool:
        return (
            batch.images.device.type == self.device_type
            and type(batch.images) is Tensor
            and not (self.model.training or batch.images.requires_grad or _as_it_is.get())
            and not torch.compiler.is_compiling()
        )

    def _forward(self, samples: Any, options: dict[str, Any]) -> Any:
        return type(self.model).forward(self.model, samples, **options)

    @contextmanager
    def _turn(self, device: torch.device) -> Iterator[None]:
        """One call at a time, for graphs share memory: on the host, and on the device, whatever streams callers use."""
        with self._graphs.lock:
            self._forget_if_moved()
            if device.type != "cuda":
                yield
                return
            stream = torch.cuda.current_stream(device)
            if self._graphs.last is not None:
                stream.wait_event(self._graphs.last)  # the device waits, the host does not
            yield
            self._graphs.last = stream.record_event()

    def _forget_if_moved(self) -> None:
        place = _place_of(self.model)
        if place != self._graphs.place:
            self._graphs.forget(self.capture())
            self._graphs.place = place

    def _graph(self, batch: ImageBatch, options: dict[str, Any]) -> _Graph | None:
        """The graph for a batch, where there is one or should be one."""
        images, padded = batch.images, batch.padded is not False
        graphs, autocast = self._graphs, torch.is_autocast_enabled(self.device_type)
        dtypes = (images.dtype, torch.get_autocast_dtype(self.device_type) if autocast else None)
        key = (tuple(images.shape), dtypes, images.device, padded, tuple(sorted(options.items())))
        if key not in graphs.of and key in graphs.seen and len(graphs.of) < self.sizes.most:

            def run(images: Tensor, mask: Tensor) -> Any:
                # Without sizes: the host must not decide by them what is captured.
                return self._forward(ImageBatch(images, mask, padded=None if padded else False), options)

            graphs.of[key] = _Graph(run, images, batch.mask, graphs.capture)
        if len(graphs.seen) >= MOST_REMEMBERED:
            graphs.seen.clear()
        graphs.seen.add(key)
        return graphs.of.get(key)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_graphs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._graphs = _Graphs(self.capture())


class _Graphs:
    """The graphs of a model, by size; they belong to weights in one place."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.of: dict[tuple[Any, ...], _Graph] = {}
        self.seen: set[tuple[Any, ...]] = set()
        self.place: tuple[Any, ...] = ()
        self.last: torch.cuda.Event | None = None
        self.lock = threading.RLock()

    def forget(self, capture: Capture) -> None:
        """Begin anew."""
        if self.last is not None:
            self.last.synchronize()  # a meant wait: a graph that still runs must not be deleted
        self.capture, self.last = capture, None
        self.of.clear()
        self.seen.clear()


class _Graph:
    """One captured size, with the memory that its inputs are copied into."""

    def __init__(self, run: Run, images: Tensor, mask: Tensor, capture: Capture) -> None:
        # Memory that is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.images, self.mask = images.clone(), mask.clone()
            self.replay = capture(run, self.images, self.mask)

    def __call__(self, images: Tensor, mask: Tensor) -> Any:
        self.images.copy_(images)
        self.mask.copy_(mask)
        return cloned(self.replay())


class CudaCapture:
    """Captures with CUDA. All graphs of one instance share their memory, so only one of them may run at a time."""

    def __init__(self) -> None:
        self._pool = GraphPool()

    def __call__(self, run: Run, images: Tensor, mask: Tensor) -> Callable[[], Any]:
        """A function that runs the graph of ``run(images, mask)``; it returns the same tensors each time."""
        with torch.cuda.device(images.device):
            self._warm_up(run, images, mask)
            return self._pool.capture(lambda: run(images, mask))

    def _warm_up(self, run: Run, images: Tensor, mask: Tensor) -> None:
        """What kernels choose and allocate at their first calls must not be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(images, mask)
        torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def without_graphs() -> Iterator[None]:
    """Calls of this thread run models as they are, so that hooks of their modules are called."""
    token = _as_it_is.set(True)
    try:
        yield
    finally:
        _as_it_is.reset(token)


def framed(batch: ImageBatch, multiple: int) -> ImageBatch:
    """The same in a frame whose sides are multiples of ``multiple``."""
    if all(side % multiple == 0 for side in batch.images.shape[-2:]):
        return batch
    height, width = batch.images.shape[-2:]
    sizes = ((height, width),) * len(batch) if batch.padded is False else batch.sizes
    return ImageBatch(*pad_to_multiple(batch, multiple), sizes)


def pad_to_multiple(batch: ImageBatch, multiple: int) -> tuple[Tensor, Tensor]:
    """Images and mask in a frame whose sides are multiples of ``multiple``."""
    height, width = (-side % multiple for side in batch.images.shape[-2:])
    frame = (0, width, 0, height)
    return nn.functional.pad(batch.images, frame), nn.functional.pad(batch.mask, frame, value=True)


def cloned(outputs: Any) -> Any:
    """A model's outputs in memory of their own."""
    if isinstance(outputs, Tensor):
        return outputs.clone()
    if isinstance(outputs, dict):
        return {name: cloned(value) for name, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(cloned(value) for value in outputs)
    if isinstance(outputs, QueryMasks):
        masks = copy.copy(outputs)
        masks.attention, masks.maps = cloned(outputs.attention), cloned(outputs.maps)
        return masks
    return outputs


def _place_of(model: nn.Module) -> tuple[Any, ...]:
    """Where the weights lie; a graph reads them there."""
    parameter = next(model.parameters(), None)
    return () if parameter is None else (parameter.device, parameter.data_ptr(), parameter.dtype)
