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
from detr_fast.ops import (
    PackedBlock,
    PackedBlocks,
    PackedConv,
    conv_blocks,
    conv_blocks_memory,
    conv_max_pool,
    pack_conv,
)
from detr_fast.ops.conv_blocks.native import use_huge_pages

_LINE = 32  # numbers that fill a line of the cache: 16 of float32, 32 of bfloat16


def _count(shape: Sequence[int]) -> int:
    """The numbers of a map, up to the end of a line."""
    return -(-math.prod(shape) // _LINE) * _LINE


class Workspace:
    """Memory for the maps of one call; the next one writes over it, at any size.

    A large map that is allocated afresh costs more in page faults than many a convolution takes to fill it. There is
    room for a map at either end, such as those before and after a block, and for others between.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._taken = [0, 0]  # numbers at the two ends

    def reserve(self, size: int, x: Tensor) -> None:
        """Begin a call whose maps take ``size`` numbers of the kind of ``x`` at most at the same time."""
        self._taken = [0, 0]
        memory = self._memory
        if memory is None or len(memory) < size or memory.dtype != x.dtype or memory.device != x.device:
            self._memory = None  # given back before more is taken
            # Inside torch.inference_mode it would be of no use to a call outside.
            with torch.inference_mode(False):
                self._memory = torch.empty(size // _LINE * _LINE + _LINE, dtype=x.dtype, device=x.device)
            use_huge_pages(self._memory)

    def take(self, end: int, shape: Sequence[int]) -> Tensor:
        """A map [B, K, H, W], channels last, at end 0 or 1, in place of the one that was there."""
        assert self._memory is not None
        batch, channels, rows, columns = shape
        size = self._taken[end] = _count(shape)
        memory = self._memory[:size] if end == 0 else self._memory[len(self._memory) - size :]
        return memory[: math.prod(shape)].view(batch, rows, columns, channels).permute(0, 3, 1, 2)

    def give(self, end: int) -> None:
        """Nobody reads the map at this end any more."""
        self._taken[end] = 0

    def between(self) -> Tensor:
        """The numbers that are not taken."""
        assert self._memory is not None
        return self._memory[self._taken[0] : len(self._memory) - self._taken[1]]


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


def packed_block(block: nn.Module, dtype: torch.dtype) -> PackedBlock:
    """A ``BasicBlock`` or ``Bottleneck`` with its norms folded."""
    assert isinstance(block, (BasicBlock, Bottleneck))
    pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if isinstance(block, Bottleneck):
        pairs.append((block.conv3, block.bn3))
    downsample = block.downsample
    shortcut = None if downsample is None else folded(downsample[0], downsample[1], dtype)
    return PackedBlock(tuple(folded(conv, norm, dtype) for conv, norm in pairs), shortcut)


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
        self.stages = [PackedBlocks([packed_block(block, dtype) for block in stage]) for stage in stages]
        self.workspaces = Workspaces()

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to the maps of the four stages, or of the last, at 1/4 to 1/32 (dilated: 1/16) of the size."""
        x = images.to(self.dtype)
        size = self._most_at_once(x)
        # Elsewhere the allocator keeps memory by itself, and a compiler plans its own.
        if size is None:
            maps = self._run(x, None)
        else:
            with self.workspaces.one() as workspace:
                workspace.reserve(size, x)
                maps = self._run(x, workspace)
        return [y.to(images.dtype) for y in maps]

    def _run(self, x: Tensor, workspace: Workspace | None) -> list[Tensor]:
        if workspace is None:
            x = conv_max_pool(x, self.stem)
        else:
            x = conv_max_pool(x, self.stem, out=workspace.take(0, self._pooled_shape(x.shape)))
        maps = []
        for number, stage in enumerate(self.stages, start=1):
            is_kept = self._is_kept(stage)
            if workspace is None:
                x = conv_blocks(x, stage)
            else:
                # From one end to the other. What is returned lies elsewhere: the workspace is for the next call.
                out = None if is_kept else workspace.take(number % 2, stage.shape_after(x.shape))
                x = conv_blocks(x, stage, out=out, memory=workspace.between())
                workspace.give((number - 1) % 2)
            if is_kept:
                maps.append(x)
        return maps

    def _is_kept(self, stage: PackedBlocks) -> bool:
        return self.all_maps or stage is self.stages[-1]

    def _pooled_shape(self, images: Sequence[int]) -> list[int]:
        rows, columns = self.stem.out_size(*images[2:])
        return [images[0], self.stem.shape[0], (rows + 1) // 2, (columns + 1) // 2]

    def _most_at_once(self, images: Tensor) -> int | None:
        """Numbers of a workspace: a stage is given a map in it, writes maps between, and gives one; None for none."""
        if images.ndim != 4:
            return None  # the stem will say so
        shape, most = self._pooled_shape(images.shape), 0
        before = _count(shape)
        for stage in self.stages:
            between = conv_blocks_memory(images, shape, stage)
            if between is None:
                return None
            shape = stage.shape_after(shape)
            after = 0 if self._is_kept(stage) else _count(shape)
            most, before = max(most, before + between + after), after
        return most

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedResNet:
        super()._apply(fn, recurse)
        self.stem = applied(fn, self.stem)
        self.stages = [stage.apply(lambda packed: applied(fn, packed)) for stage in self.stages]
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
