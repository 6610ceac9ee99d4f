"""A ResNet for inference: norms folded, bias, sum and ReLU inside the convolutions, maps in memory that is kept."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.models.backbone import BasicBlock, Bottleneck, FrozenBatchNorm2d, ResNet
from detr_fast.ops import PackedConv, conv, conv_max_pool, pack_conv


class Workspace:
    """Memory for the maps of one call; the next one writes over it, at any size.

    A large map that is allocated afresh costs more in page faults than many a convolution takes to fill it. Maps that
    are not needed at the same time lie in the same place.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._taken: dict[str, tuple[int, int]] = {}

    def reserve(self, size: int, x: Tensor) -> None:
        """Begin a call whose maps take ``size`` numbers of the kind of ``x`` at most at the same time."""
        self._taken.clear()
        memory = self._memory
        # Twice as many, because there may be gaps between them. The system gives no memory for what is never written.
        if memory is None or len(memory) < 2 * size or memory.dtype != x.dtype or memory.device != x.device:
            self._memory = None  # given back before more is taken
            # Inside torch.inference_mode it would be of no use to a call outside.
            with torch.inference_mode(False):
                self._memory = torch.empty(2 * size, dtype=x.dtype, device=x.device)

    def take(self, name: str, x: Tensor, packed: PackedConv, pooled: bool = False) -> Tensor | None:
        """Where ``conv(x, packed)`` may write its result [B, K, H', W'], which is called ``name``; None: no room.

        ``pooled``: where ``conv_max_pool`` may.
        """
        batch, channels, rows, columns = shape_of_result(x.shape, packed, pooled)
        size = batch * channels * rows * columns
        place = self._first_gap(size)
        if self._memory is None or place + size > len(self._memory):
            return None
        # A little room behind it: a quarter of a map of odd sides is a little more than a quarter.
        self._taken[name] = (place, place + (size + size // 16 + _LINE - 1) // _LINE * _LINE)
        return self._memory[place : place + size].view(batch, rows, columns, channels).permute(0, 3, 1, 2)

    def give(self, name: str) -> None:
        """Nobody reads the map called ``name`` any more."""
        self._taken.pop(name, None)

    def _first_gap(self, size: int) -> int:
        place = 0
        for start, end in sorted(self._taken.values()):
            if place + size <= start:
                break
            place = end
        return place


_LINE = 32  # numbers that fill a line of the cache: 16 of float32, 32 of bfloat16


def shape_of_result(shape: Sequence[int], packed: PackedConv, pooled: bool = False) -> tuple[int, int, int, int]:
    """[B, K, H', W'] of the result for a map of this shape."""
    rows, columns = packed.out_size(*shape[2:])
    if pooled:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    return shape[0], packed.shape[0], rows, columns


def _room(workspace: Workspace | None, name: str, x: Tensor, packed: PackedConv, pooled: bool = False) -> Tensor | None:
    return None if workspace is None else workspace.take(name, x, packed, pooled)


def _give(workspace: Workspace | None, name: str) -> None:
    if workspace is not None:
        workspace.give(name)


class Workspaces:
    """As many workspaces as there ever were calls at the same time; copies and pickles hold none."""

    def __init__(self) -> None:
        self._free: deque[Workspace] = deque()

    @contextmanager
    def one(self) -> Iterator[Workspace]:
        """A workspace that nobody else has."""
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = Workspace()
        try:
            yield workspace
        finally:
            self._free.append(workspace)

    def __getstate__(self) -> dict[str, Any]:
        return {"_free": deque()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspaces:
        return Workspaces()


class PackedBlock:
    """The convolutions of a ``BasicBlock`` or ``Bottleneck``, one behind the other, and of its shortcut."""

    def __init__(self, convs: list[PackedConv], shortcut: PackedConv | None) -> None:
        self.convs, self.shortcut = convs, shortcut

    @staticmethod
    def of(block: nn.Module, dtype: torch.dtype) -> PackedBlock:
        """With its norms folded."""
        assert isinstance(block, (BasicBlock, Bottleneck))
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if isinstance(block, Bottleneck):
            pairs.append((block.conv3, block.bn3))
        downsample = block.downsample
        shortcut = None if downsample is None else folded(downsample[0], downsample[1], dtype)
        return PackedBlock([folded(conv, norm, dtype) for conv, norm in pairs], shortcut)

    def __call__(self, x: Tensor, workspace: Workspace | None, name: str) -> Tensor:
        """The block's map, called ``name``; without a shortcut convolution in the memory of ``x`` itself."""
        y = x
        for number, packed in enumerate(self.convs[:-1]):
            y = conv(y, packed, relu=True, out=_room(workspace, f"inner{number}", y, packed))
            _give(workspace, f"inner{number - 1}")
        if self.shortcut is not None:
            x = conv(x, self.shortcut, out=_room(workspace, name, x, self.shortcut))
        y = conv(y, self.convs[-1], residual=x, relu=True, out=None if workspace is None else x)
        _give(workspace, f"inner{len(self.convs) - 2}")
        return y

    def sizes(self, shape: Sequence[int]) -> tuple[int, Sequence[int]]:
        """How many numbers the maps between have, and the shape of the block's map, for a map of this shape."""
        inner = 0
        for packed in self.convs:
            shape = shape_of_result(shape, packed)
            inner += math.prod(shape)
        return inner - math.prod(shape), shape

    def apply(self, fn: Callable[[Tensor], Tensor]) -> PackedBlock:
        """With ``fn`` applied to every weight and bias."""
        shortcut = None if self.shortcut is None else applied(fn, self.shortcut)
        return PackedBlock([applied(fn, packed) for packed in self.convs], shortcut)


class PackedResNet(nn.Module):
    """Computes what a ``ResNet`` computes in eval mode. It can be pickled, copied, moved, and called by many threads.

    It has no parameters: ``state_dict`` knows nothing of it.

    Args:
        body: stays as it is; its weights are copied. Its norms are frozen batch norms or ordinary ones.
        all_maps: return the maps of all four stages; otherwise a list of the last alone.
        dtype: of the computation, None: of the weights; the maps returned are of the images' dtype.

    Raises:
        ValueError: ``body`` has a norm or a convolution of another kind.
    """

    def __init__(self, body: ResNet, *, all_maps: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.all_maps = all_maps
        self.dtype = dtype = dtype or body.conv1.weight.dtype
        self.stage_channels = body.stage_channels
        self.stem = folded(body.conv1, body.bn1, dtype)
        stages = (body.layer1, body.layer2, body.layer3, body.layer4)
        self.stages = [[PackedBlock.of(block, dtype) for block in stage] for stage in stages]
        self.workspaces = Workspaces()

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to the maps of the four stages, or of the last, at 1/4 to 1/32 (dilated: 1/16) of the size."""
        # The allocator of a GPU keeps memory by itself, and a compiler plans its own.
        if images.device.type != "cpu" or torch.compiler.is_compiling() or type(images) is not Tensor:
            return self._run(images, None)
        with self.workspaces.one() as workspace:
            return self._run(images, workspace)

    def _run(self, images: Tensor, workspace: Workspace | None) -> list[Tensor]:
        x = images.to(self.dtype)
        if workspace is not None:
            workspace.reserve(self._most_at_once(x.shape), x)
        name = "pooled"
        x = conv_max_pool(x, self.stem, out=_room(workspace, name, x, self.stem, pooled=True))
        maps = []
        for number, stage in enumerate(self.stages):
            for block in stage:
                before, name = name, name if block.shortcut is None else f"maps{number}"
                x = block(x, workspace, name)
                if before != name:
                    _give(workspace, before)
            if self.all_maps or stage is self.stages[-1]:
                # A copy: the workspace's memory is for the next call.
                maps.append(x.to(images.dtype, copy=True))
        return maps

    def _most_at_once(self, images: Sequence[int]) -> int:
        """The numbers of the largest block: what it is given, what lies between, what it gives."""
        shape: Sequence[int] = shape_of_result(images, self.stem, pooled=True)
        most = 0
        for block in (block for stage in self.stages for block in stage):
            inner, after = block.sizes(shape)
            most = max(most, math.prod(shape) + inner + math.prod(after))
            shape = after
        return most

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedResNet:
        super()._apply(fn, recurse)
        self.stem = applied(fn, self.stem)
        self.stages = [[block.apply(fn) for block in stage] for stage in self.stages]
        self.dtype = self.stem.dtype
        return self


def can_pack(body: ResNet) -> bool:
    """Whether every norm of ``body`` is a batch norm with statistics."""
    norms = [module for name, module in body.named_modules() if name.rpartition(".")[2] in ("bn1", "bn2", "bn3")]
    norms += [module[1] for name, module in body.named_modules() if name.endswith("downsample")]  # type: ignore[index]
    return all(isinstance(m, FrozenBatchNorm2d) or (type(m) is nn.BatchNorm2d and m.track_running_stats) for m in norms)


def folded(conv: nn.Module, norm: nn.Module, dtype: torch.dtype | None = None) -> PackedConv:
    """norm(conv(x)) as one convolution in ``dtype`` (None: the weight's own, in which it is formed)."""
    simple = isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.padding_mode == "zeros"
    if not isinstance(conv, nn.Conv2d) or not simple or isinstance(conv.padding, str):
        raise ValueError(f"a convolution must be nn.Conv2d in one group with zeros around it, got {conv}")
    scale, shift = _scale_and_shift(norm)
    if conv.bias is not None:
        shift = shift + conv.bias.detach() * scale
    (stride, _), (padding, _), (dilation, _) = conv.stride, conv.padding, conv.dilation
    packed = pack_conv(conv.weight, shift, scale=scale, stride=stride, padding=padding, dilation=dilation)
    return packed if dtype in (None, packed.dtype) else applied(lambda x: x.to(dtype), packed)


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(norm, FrozenBatchNorm2d):
        return norm.scale_and_shift()
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"a norm must be FrozenBatchNorm2d or nn.BatchNorm2d with statistics, got {norm}")
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


def applied(fn: Callable[[Tensor], Tensor], packed: PackedConv) -> PackedConv:
    """The same convolution with ``fn`` applied to weight and bias, such as a move to another device."""
    bias = None if packed.bias is None else fn(packed.bias)
    steps = {"stride": packed.stride, "padding": packed.padding, "dilation": packed.dilation}
    return PackedConv.of(fn(packed.weight), bias, **steps)
