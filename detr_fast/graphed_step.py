"""A training update as a CUDA graph: one launch from the images to the new weights, in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr_fast.criterion import why_not_padded
from detr_fast.cuda_graphs import GraphPool
from detr_fast.data.batch import ImageBatch
from detr_fast.data.target_batch import TargetBatch
from detr_fast.distributed import is_distributed
from detr_fast.ops import PackedTargets, PaddedTargets
from detr_fast.ops.matching.api import OP as MATCHING
from detr_fast.ops.set_loss.api import OP as SET_LOSS
from detr_fast.targets import pack

# Pixels. Neither number is measured yet: finer sizes compute on less padding, and are more to capture.
GRAPH_MULTIPLE = 128
MOST_GRAPHS = 16
# Targets of an image that every graph has room for; COCO's images have 7 on average. Not measured, either.
LEAST_ROOM = 32
# Each size seen once is remembered, to know it when it comes again; beyond so many, memory begins anew.
MOST_REMEMBERED = 4096


class Update(NamedTuple):
    """What an update leaves behind besides new weights; tensors on the device, without gradients.

    Attributes:
        losses: every loss by its name.
        total: their weighted sum.
        finite: 1 where it and the gradient are finite; else 0, and the weights are as they were.
    """

    losses: dict[str, Tensor]
    total: Tensor
    finite: Tensor


Values = tuple[Tensor, Tensor]  # [1 + losses], total first; finite
Capture = Callable[[Callable[[], Values]], Callable[[], Values]]


class GraphedStep:
    """Runs updates as CUDA graphs: forward, matching, losses, backward, clipping, the check that all of it is finite,
    and the optimizer.

    A graph is of one size. So images are padded to multiples of ``multiple`` pixels, and targets, packed, to a power of
    two for each image; how many there are the graph reads on the device. A size's first batch is left to the caller;
    its second one runs as it is in the graph's memory, which compiles kernels and makes the optimizer's state; its
    third one is captured. From ``most`` sizes on, further ones are left to the caller.

    Learning rates are read on the device, so that a schedule goes on; other options of the optimizer and of ``update``
    are those of the capture. Gradients exist in a graph alone, and all graphs share the memory for them and for
    activations. Dropout draws from torch's generator, whose state graphs advance: every replay drops other elements.
    Where weights, the optimizer's state or what is ``held`` lie somewhere else than before, graphs are captured anew.

    **It has not run on a GPU yet, and its speed is not measured**: its tests put a stand-in in place of the capture.

    Args:
        update: does it all, in place and without a wait; it may look at the shapes of its arguments and at nothing
            else of them, and begins and ends without gradients.
        optimizer: the one that ``update`` steps: fused, and of one device.
        held: what ``update`` reads besides, where that may come to lie somewhere else.
        capture: makes of a function, which has been called before, one that does the same with what then lies in the
            memory that it uses; ``GraphPool.capture``.
    """

    def __init__(
        self,
        update: Callable[[ImageBatch, PaddedTargets], Update],
        optimizer: torch.optim.Optimizer,
        *,
        held: Callable[[], Sequence[Tensor]] = tuple,
        multiple: int = GRAPH_MULTIPLE,
        most: int = MOST_GRAPHS,
        capture: Capture | None = None,
    ) -> None:
        self.update, self.optimizer, self.held = update, optimizer, held
        self.multiple, self.most = multiple, most
        self.device = next(p for group in optimizer.param_groups for p in group["params"]).device
        # One stream for every update, captured or not: autograd adds gradients up on the stream that it first saw.
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.pool = GraphPool()
        self.capture: Capture = capture or (lambda run: self.pool.capture(run, self.stream))
        self.rates = _Rates(optimizer, self.device)
        self.seen: set[tuple[Any, ...]] = set()
        self.sizes: dict[tuple[Any, ...], _Size] = {}
        self._place: tuple[int, ...] = ()

    def __call__(self, images: ImageBatch, targets: TargetBatch) -> Update | None:
        """Update the weights by a batch on the device; None where that is left to the caller. Within a ``turn``."""
        self._forget_if_moved()
        packed = pack(targets)
        shape, room = self._frame(images.images), room_for(packed.num_targets)
        key = (shape, images.images.dtype, room, packed.boxes.dtype)
        if key not in self.seen:
            self._remember(key)
            return None
        if key not in self.sizes and len(self.sizes) == self.most:
            return None
        is_new = key not in self.sizes
        if is_new:
            self.sizes[key] = _Size(StaticBatch(shape, images, packed, room))
        size = self.sizes[key]
        size.memory.fill(images, packed)
        self.rates.send()
        return self._run(size) if is_new else self._replay(size)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within it, work goes to the stream of all updates; what comes before and after does so on the device too."""
        if self.stream is None:
            yield
            return
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)  # the device waits, the host does not
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            before.wait_stream(self.stream)  # likewise

    def _run(self, size: _Size) -> Update:
        with self.rates.on_device():
            return self.update(*size.memory.batch())

    def _replay(self, size: _Size) -> Update:
        if size.replay is None:
            size.replay = self.capture(lambda: self._values(size))
        # The next replay writes over a graph's results.
        values, finite = (tensor.clone() for tensor in size.replay())
        return Update(dict(zip(size.names, values[1:].unbind(), strict=True)), values[0], finite)

    def _values(self, size: _Size) -> Values:
        losses, total, finite = self._run(size)
        size.names = list(losses)
        return torch.stack([total, *losses.values()]), finite

    def _frame(self, images: Tensor) -> tuple[int, ...]:
        *rest, height, width = images.shape
        return (*rest, *(-(-side // self.multiple) * self.multiple for side in (height, width)))

    def _remember(self, key: tuple[Any, ...]) -> None:
        if len(self.seen) == MOST_REMEMBERED:
            self.seen = set(self.sizes)
        self.seen.add(key)

    def _forget_if_moved(self) -> None:
        parameter = self.optimizer.param_groups[0]["params"][0]
        state = self.optimizer.state.get(parameter, {}).values()
        place = tuple(x.data_ptr() for x in (parameter, *state, *self.held()) if isinstance(x, Tensor))
        if place != self._place and self.sizes:
            if self.stream is not None:
                self.stream.synchronize()  # a meant wait: a graph that still runs must not be deleted
            self.sizes.clear()
            self.pool = GraphPool()
        self._place = place


class StaticBatch:
    """The memory that a graph reads its batch from."""

    def __init__(self, shape: tuple[int, ...], images: ImageBatch, packed: PackedTargets, room: int) -> None:
        batch, _, height, width = shape
        self.images = images.images.new_zeros(shape)
        self.mask = images.mask.new_ones((batch, height, width))
        labels, boxes = packed.labels.new_zeros(batch * room), packed.boxes.new_zeros(batch * room, 4)
        self.targets = PaddedTargets(labels, boxes, packed.labels.new_zeros(batch + 1), most=room)

    def fill(self, images: ImageBatch, packed: PackedTargets) -> None:
        """Take in a batch of images of at most this size, with at most so many targets. Does not wait."""
        height, width = images.images.shape[-2:]
        self.images.zero_()[..., :height, :width].copy_(images.images)
        self.mask.fill_(True)[..., :height, :width].copy_(images.mask)
        count = len(packed.labels)
        self.targets.labels[:count].copy_(packed.labels)
        self.targets.boxes[:count].copy_(packed.boxes)
        offsets = torch.tensor([0, *accumulate(packed.num_targets)])
        if self.targets.offsets.is_cuda:
            offsets = offsets.pin_memory()
        self.targets.offsets.copy_(offsets, non_blocking=True)

    def batch(self) -> tuple[ImageBatch, PaddedTargets]:
        """What an update takes. Without sizes: the host must not decide by them what is captured."""
        return ImageBatch(self.images, self.mask), self.targets


class _Size:
    """What belongs to batches of one size: memory, and from the third batch on the graph."""

    def __init__(self, memory: StaticBatch) -> None:
        self.memory = memory
        self.replay: Callable[[], Values] | None = None
        self.names: list[str] = []


class _Rates:
    """The optimizer's learning rates on the device, where a graph reads them; elsewhere they stay numbers."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.groups = optimizer.param_groups
        # float32 is what the fused kernel reads.
        self.tensors = [torch.zeros((), device=device) for _ in self.groups]
        self.sent: list[float | None] = [None] * len(self.groups)

    def send(self) -> None:
        """Bring them up to date: a launch each, where one has changed."""
        for index, (group, tensor) in enumerate(zip(self.groups, self.tensors, strict=True)):
            if group["lr"] != self.sent[index]:
                tensor.fill_(group["lr"])
                self.sent[index] = group["lr"]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it, the optimizer's step reads them there."""
        # Only while it is captured the optimizer may be told so: it warns otherwise.
        capturable = self.tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        before = [(group["lr"], group["capturable"]) for group in self.groups]
        try:
            for group, tensor in zip(self.groups, self.tensors, strict=True):
                group.update(lr=tensor, capturable=capturable)
            yield
        finally:
            for group, (lr, was_capturable) in zip(self.groups, before, strict=True):
                group.update(lr=lr, capturable=was_capturable)


def room_for(num_targets: Sequence[int]) -> int:
    """The power of two that holds each image's targets, at least LEAST_ROOM."""
    return max(LEAST_ROOM, 1 << (max(num_targets, default=0) - 1).bit_length())


def why_not_graphed(device: torch.device, criterion: nn.Module) -> str | None:
    """What keeps updates from being captured; None where nothing does."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, got {device.type}"
    if is_distributed():
        return "a captured update does not average gradients over processes"
    for op, name in ((MATCHING, "native"), (SET_LOSS, "triton")):
        reason = op.reasons(device)[name]
        if reason is not None:
            return f"{op.name} waits for the device without its {name} kernel, and {reason}"
    return why_not_padded(criterion)
