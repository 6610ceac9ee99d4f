"""Residual blocks of convolutions for inference, one after the other in one call."""

from detr_fast.ops.conv_blocks.api import conv_blocks, conv_blocks_memory
from detr_fast.ops.conv_blocks.types import PackedBlock, PackedBlocks

__all__ = ["PackedBlock", "PackedBlocks", "conv_blocks", "conv_blocks_memory"]
