"""What ``conv_blocks`` takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from detr_fast.ops.conv import PackedConv


class PackedBlock(NamedTuple):
    """relu(convs(x) + shortcut(x)), with a ReLU between two convolutions (He et al. 2016, figure 5).

    Attributes:
        convs: one behind the other, two at least.
        shortcut: None is the identity.
    """

    convs: tuple[PackedConv, ...]
    shortcut: PackedConv | None = None

    def shape_after(self, shape: Sequence[int]) -> list[int]:
        """[B, K, H', W'] of the result for a map of this shape.

        Raises:
            ValueError: a kernel does not fit into a map.
        """
        batch, _, height, width = shape
        for packed in self.convs:
            size = height, width
            height, width = packed.out_size(height, width)
            if min(height, width) < 1:
                raise ValueError(f"a map must be at least as large as the kernel of {packed}, got {list(size)}")
        return [batch, self.convs[-1].shape[0], height, width]


class PackedBlocks:
    """Residual blocks, one after the other. It can be pickled and used by several threads at once.

    Args:
        blocks: such that the map keeps its shape from the first block on.

    Raises:
        ValueError: there is no block or one of a single convolution, the channels of two convolutions do not fit, or a
            block beyond the first has a convolution in its shortcut.
    """

    def __init__(self, blocks: Sequence[PackedBlock]) -> None:
        self.blocks = tuple(blocks)
        self._native: Any = None
        if not self.blocks or any(len(block.convs) < 2 for block in self.blocks):
            raise ValueError(f"blocks must be some, of two or more convolutions each, got {blocks}")
        channels = self.blocks[0].convs[0].shape[1]
        for number, (convs, shortcut) in enumerate(self.blocks):
            if number > 0 and shortcut is not None:
                raise ValueError(f"only the first block may have a convolution in its shortcut, got {shortcut}")
            before = channels
            for packed in convs:
                _check_channels(packed, channels)
                channels = packed.shape[0]
            if shortcut is not None:
                _check_channels(shortcut, before)
                before = shortcut.shape[0]
            if before != channels:
                raise ValueError(f"a block's convolutions and its shortcut must have as many channels, got {self}")

    def shape_after(self, shape: Sequence[int]) -> list[int]:
        """[B, K, H', W'] of the result for a map of this shape; ValueError where a kernel does not fit into it."""
        return self.blocks[0].shape_after(shape)

    def apply(self, fn: Callable[[PackedConv], PackedConv]) -> PackedBlocks:
        """With ``fn`` applied to every convolution."""
        return PackedBlocks(
            [
                PackedBlock(tuple(fn(packed) for packed in convs), None if shortcut is None else fn(shortcut))
                for convs, shortcut in self.blocks
            ]
        )

    def native(self, make: Callable[[tuple[PackedBlock, ...]], Any]) -> Any:
        """What native code knows of the blocks, which ``make`` makes of them the first time."""
        made = self._native
        if made is None:
            made = self._native = make(self.blocks)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}

    def __repr__(self) -> str:
        return f"PackedBlocks({list(self.blocks)})"


def _check_channels(packed: PackedConv, channels: int) -> None:
    if packed.shape[1] != channels:
        raise ValueError(f"a convolution must take the {channels} channels of the map before it, got {packed}")


class BlocksInputs(NamedTuple):
    """A call of ``conv_blocks``, checked, as its implementations take it."""

    x: Tensor  # [B, C, H, W]
    blocks: PackedBlocks
    out: Tensor | None  # [B, K, H', W'], channels last
    memory: Tensor | None
