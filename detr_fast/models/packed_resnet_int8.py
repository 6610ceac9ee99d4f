"""A ResNet for inference that computes in 8-bit integers, and the calibration that finds what its bytes stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_fast.models.backbone import ResNet
from detr_fast.models.packed_resnet import Workspace, Workspaces, applied, folded, packed_block
from detr_fast.ops import PackedConv, PackedConvInt8, Steps, conv, conv_int8, conv_max_pool, to_bytes


class Range:
    """The lowest and the highest number of a map over all calibration images; 0 is within."""

    def __init__(self) -> None:
        self.lowest = self.highest = 0.0

    def add(self, x: Tensor) -> Tensor:
        """Count a map in, and give it back."""
        # Waits for the device, as calibration may.
        lowest, highest = (float(bound) for bound in torch.aminmax(x))
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError(f"calibration images must give finite maps, got one from {lowest} to {highest}")
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        return x

    def steps(self) -> Steps:
        """What bytes stand for that reach over it."""
        return Steps.of(self.lowest, self.highest)


class CalibratedBlock:
    """A block in float32 that remembers the ranges of its maps."""

    def __init__(self, block: nn.Module) -> None:
        self.packed = packed_block(block, torch.float32)
        self.between = [Range() for _ in self.packed.convs[1:]]
        self.shortcut, self.result = Range(), Range()

    def __call__(self, x: Tensor) -> Tensor:
        y = x
        for packed, found in zip(self.packed.convs, self.between, strict=False):
            y = found.add(conv(y, packed, relu=True))
        if self.packed.shortcut is not None:
            x = self.shortcut.add(conv(x, self.packed.shortcut))
        return self.result.add(conv(y, self.packed.convs[-1], residual=x, relu=True))

    def in_int8(self, x: Steps, *, is_last: bool) -> Int8Block:
        """The block for a map of bytes that stand for ``x``; the last one's result is float32."""
        maps = [x, *(found.steps() for found in self.between)]
        convs = [
            _in_int8(packed, x=x, out=out) for packed, x, out in zip(self.packed.convs, maps, maps[1:], strict=False)
        ]
        has_shortcut = self.packed.shortcut is not None
        residual = self.shortcut.steps() if has_shortcut else x
        out = None if is_last else self.result.steps()
        convs.append(_in_int8(self.packed.convs[-1], x=maps[-1], out=out, residual=residual))
        shortcut = None if self.packed.shortcut is None else _in_int8(self.packed.shortcut, x=x, out=residual)
        return Int8Block(convs, shortcut)


class Calibration(nn.Module):
    """A ResNet in float32, for inference, that remembers the ranges of its maps.

    Args:
        body: stays as it is; its weights are copied.
        all_maps: return the maps of all four stages; otherwise a list of the last alone.
    """

    def __init__(self, body: ResNet, *, all_maps: bool) -> None:
        super().__init__()
        self.stage_channels, self.all_maps = body.stage_channels, all_maps
        self.stem = folded(body.conv1, body.bn1, torch.float32)
        stages = (body.layer1, body.layer2, body.layer3, body.layer4)
        self.stages = [[CalibratedBlock(block) for block in stage] for stage in stages]
        self.pooled = Range()
        self.calls = 0

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to the ResNet's maps.

        Raises:
            ValueError: a map has a number that is not finite.
        """
        self.calls += 1
        x, maps = self.pooled.add(conv_max_pool(images.float(), self.stem)), []
        for stage in self.stages:
            for block in stage:
                x = block(x)
            if self.all_maps or stage is self.stages[-1]:
                maps.append(x.to(images.dtype))
        return maps

    def in_int8(self) -> PackedResNetInt8:
        """What computes in 8-bit integers, once all calibration images were here."""
        steps = self.pooled.steps()
        factor, sizes = 1 / steps.size, []
        stages: list[list[Int8Block]] = []
        for stage in self.stages:
            blocks = []
            for block in stage:
                blocks.append(block.in_int8(steps, is_last=block is self.stages[-1][-1]))
                steps = block.result.steps()
            stages.append(blocks)
            sizes.append(steps.size)
        return PackedResNetInt8(self.stem, factor, stages, sizes, self.stage_channels, all_maps=self.all_maps)


class Int8Block(NamedTuple):
    """The convolutions of a ``BasicBlock`` or ``Bottleneck``, one behind the other, and of its shortcut."""

    convs: list[PackedConvInt8]
    shortcut: PackedConvInt8 | None

    def __call__(self, x: Tensor, out: Tensor | None, memory: Tensor | None) -> Tensor:
        """The block's map.

        Args:
            x: [B, C, H, W] uint8.
            out: where to write; may be ``x`` where there is no convolution in the shortcut.
            memory: bytes for the maps between.
        """
        y = x
        for packed in self.convs[:-1]:
            place, memory = _first_map(memory, _shape_after(y.shape, packed))
            y = conv_int8(y, packed, out=place)
        last = self.convs[-1]
        if self.shortcut is not None:
            # Beside the maps between where the result is no map of bytes, on which it could lie.
            place = _first_map(memory, _shape_after(x.shape, self.shortcut))[0] if last.is_float else out
            x = conv_int8(x, self.shortcut, out=place)
        return conv_int8(y, last, residual=x, relu=True, out=out)

    def shape_after(self, shape: Sequence[int]) -> list[int]:
        """[B, K, H', W'] of the result for a map of this shape."""
        for packed in self.convs:
            shape = _shape_after(shape, packed)
        return list(shape)

    def bytes_between(self, shape: Sequence[int]) -> int:
        """Of all maps but the one it is given, of this shape."""
        count = 0
        for packed in self.convs:
            shape = _shape_after(shape, packed)
            count += _whole_lines(shape)
        return count

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Int8Block:
        """With ``fn`` applied to all tensors, such as a move to another device; dtypes stay."""
        shortcut = None if self.shortcut is None else self.shortcut.apply(fn)
        return Int8Block([packed.apply(fn) for packed in self.convs], shortcut)


class PackedResNetInt8(nn.Module):
    """Computes about what a ``ResNet`` computes in eval mode. It can be pickled, copied, moved, and called by threads.

    The stem computes in float32, whose result becomes bytes; so does every map behind it but the last, which is float32
    again. It has no parameters: ``state_dict`` knows nothing of it.

    Args:
        stem: the first convolution.
        factor: from the stem's result, after pooling, to bytes.
        stages: the blocks.
        sizes: of a step of the bytes of each stage's map; of the last one, nothing asks.
        stage_channels: of each stage's map.
        all_maps: return the maps of all four stages; otherwise a list of the last alone.
    """

    def __init__(
        self,
        stem: PackedConv,
        factor: float,
        stages: list[list[Int8Block]],
        sizes: list[float],
        stage_channels: list[int],
        *,
        all_maps: bool,
    ) -> None:
        super().__init__()
        self.stem, self.factor, self.stages, self.sizes = stem, factor, stages, sizes
        self.stage_channels, self.all_maps = stage_channels, all_maps
        self.workspaces = Workspaces()

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to the maps of the four stages, or of the last, at 1/4 to 1/32 (dilated: 1/16) of the size."""
        is_plain = type(images) is Tensor and images.ndim == 4 and not torch.compiler.is_compiling()
        # Elsewhere the allocator keeps memory by itself, and a compiler plans its own.
        if images.device.type != "cpu" or not is_plain:
            return self._run(images.float(), None)
        with self.workspaces.one() as workspace:
            workspace.reserve(self._most_at_once(images.shape), torch.empty(0, dtype=torch.uint8))
            return [y.to(images.dtype) for y in self._run(images.float(), workspace)]

    def _run(self, images: Tensor, workspace: Workspace | None) -> list[Tensor]:
        x, maps = self._pooled(images, workspace), []
        end = 0  # of the workspace, at which the map lies
        for stage, size in zip(self.stages, self.sizes, strict=True):
            for block in stage:
                out = memory = None
                if workspace is not None:
                    if block.shortcut is not None:
                        end = 1 - end
                    is_bytes = not block.convs[-1].is_float
                    out = workspace.take(end, block.shape_after(x.shape)) if is_bytes else None
                    memory = workspace.between()
                x = block(x, out, memory)
                if workspace is not None:
                    workspace.give(1 - end)
            if self.all_maps or stage is self.stages[-1]:
                maps.append(x * size if x.dtype == torch.uint8 else x)
        return maps

    def _pooled(self, images: Tensor, workspace: Workspace | None) -> Tensor:
        """The stem's map after pooling, in bytes."""
        if workspace is None:
            return to_bytes(conv_max_pool(images, self.stem), self.factor)
        shape = self._pooled_shape(images.shape)
        out = workspace.take(0, shape)
        of_floats = workspace.between()[: 4 * math.prod(shape)].view(torch.float32)
        x = conv_max_pool(images, self.stem, out=_map(of_floats, shape))
        return to_bytes(x, self.factor, out=out)

    def _pooled_shape(self, images: Sequence[int]) -> list[int]:
        rows, columns = self.stem.out_size(*images[2:])
        return [images[0], self.stem.shape[0], (rows + 1) // 2, (columns + 1) // 2]

    def _most_at_once(self, images: Sequence[int]) -> int:
        """Bytes of a workspace: a block is given a map in it and writes others."""
        shape = self._pooled_shape(images)
        most = _whole_lines(shape) + 4 * math.prod(shape)
        for block in (block for stage in self.stages for block in stage):
            most = max(most, _whole_lines(shape) + block.bytes_between(shape))
            shape = block.shape_after(shape)
        return most

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedResNetInt8:
        super()._apply(fn, recurse)
        # The stem's convolution reads float32, whatever the model's other parts compute in.
        self.stem = applied(lambda x: fn(x).float(), self.stem)
        self.stages = [[block.apply(fn) for block in stage] for stage in self.stages]
        return self


def _in_int8(packed: PackedConv, *, x: Steps, out: Steps | None, residual: Steps | None = None) -> PackedConvInt8:
    place = (packed.stride, packed.padding, packed.dilation)
    return PackedConvInt8.of(packed.weight, packed.bias, x=x, out=out, residual=residual, place=place)


def _shape_after(shape: Sequence[int], packed: PackedConvInt8) -> list[int]:
    return [shape[0], packed.shape[0], *packed.out_size(*shape[2:])]


def _whole_lines(shape: Sequence[int]) -> int:
    """The bytes of a map, up to the end of a line of the cache."""
    return -(-math.prod(shape) // 64) * 64


def _first_map(memory: Tensor | None, shape: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """A map [B, K, H, W] at the start of ``memory``, and what is behind it."""
    if memory is None:
        return None, None
    return _map(memory[: math.prod(shape)], shape), memory[_whole_lines(shape) :]


def _map(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """[B, K, H, W] channels last."""
    batch, channels, rows, columns = shape
    return memory.view(batch, rows, columns, channels).permute(0, 3, 1, 2)
