"""The public op and its checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.conv.types import check_map, check_no_gradient, check_out, share_memory
from detr_fast.ops.conv_blocks.native import conv_blocks_native, floats_between, why_not
from detr_fast.ops.conv_blocks.reference import conv_blocks_reference
from detr_fast.ops.conv_blocks.types import BlocksInputs, PackedBlocks

OP = Op(
    name="conv_blocks",
    implementations=(
        Implementation("native", conv_blocks_native, why_not),
        Implementation("reference", conv_blocks_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, 1, device=device),),
)


def conv_blocks(
    x: Tensor,
    blocks: PackedBlocks,
    *,
    out: Tensor | None = None,
    memory: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The residual blocks of a stage of a ResNet, in inference.

    What ``conv`` computes layer by layer, to the bit, without the 75 microseconds that a call of it takes from Python,
    and where it pays a few pixels at a time through a whole block, see csrc/cpu/bottleneck.h.

    Args:
        x: [B, C, H, W] float.
        blocks: their convolutions, with norms folded into weights and biases.
        out: [B, K, H', W'] channels last, where to write; may not share memory with ``x``.
        memory: ``conv_blocks_memory`` numbers or more of the kind of ``x``, which are overwritten; may not share memory
            with ``x`` and ``out``. None takes them anew.
        backend: "native" or "reference"; None takes the fastest that can run here. What is compiled or exported takes
            the reference, which torch can see into.

    Returns:
        [B, K, H', W']: ``out`` where it is given, of "native" channels last.

    Raises:
        ValueError: a shape, dtype or layout is not as above, or a gradient would be needed.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. On CUDA it does not wait for the device.
    """
    inputs = BlocksInputs(x, blocks, out, memory)
    _check(inputs)
    if goes_through_dispatcher(x):
        return conv_blocks_reference(inputs)
    implementation = OP.choose(backend, x)
    if memory is not None and implementation.name == "native":
        _check_memory(memory, inputs)
    result: Tensor = implementation.run(inputs)
    return result


def conv_blocks_memory(x: Tensor, shape: Sequence[int], blocks: PackedBlocks) -> int | None:
    """How many numbers ``conv_blocks`` works in for a map of this shape.

    Args:
        x: a tensor of the map's dtype and device.

    Returns:
        None where it takes no ``memory``, because the reference runs.
    """
    if goes_through_dispatcher(x) or OP.choose(None, x).name != "native":
        return None
    return floats_between(blocks, shape)


def _check(inputs: BlocksInputs) -> None:
    x, blocks, out, _ = inputs
    first = blocks.blocks[0]
    check_map(x, first.convs[0])
    shape = first.shape_after(x.shape)
    past = list(x.shape)
    if first.shortcut is not None:
        past = [len(x), first.shortcut.shape[0], *first.shortcut.out_size(*x.shape[2:])]
    if past != shape:
        raise ValueError(f"x must be such that a block and its shortcut give maps of one shape, got {list(x.shape)}")
    for block in blocks.blocks[1:]:
        if block.shape_after(shape) != shape:
            raise ValueError(f"blocks beyond the first must keep the shape of the map, got {block}")
    check_out(out, shape, x)
    check_no_gradient(x=x, out=out)


def _check_memory(memory: Tensor, inputs: BlocksInputs) -> None:
    x, blocks, out, _ = inputs
    least = floats_between(blocks, x.shape)
    if memory.ndim != 1 or len(memory) < least or memory.dtype != x.dtype or not memory.is_contiguous():
        got = f"{memory.dtype} {list(memory.shape)}"
        raise ValueError(f"memory must be contiguous {x.dtype} of {least} numbers or more, got {got}")
    for name, tensor in (("x", x), ("out", out)):
        if tensor is not None and share_memory(memory, tensor):
            raise ValueError(f"memory must not share memory with {name}")
