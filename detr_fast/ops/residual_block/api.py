"""The public op and its checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.residual_block.native import residual_block_native, why_not
from detr_fast.ops.residual_block.reference import residual_block_reference
from detr_fast.ops.residual_block.types import FrozenConv

OP = Op(
    name="residual_block",
    implementations=(
        Implementation("native", residual_block_native, why_not),
        Implementation("reference", residual_block_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, 1, device=device),),
)


def residual_block(
    x: Tensor, layers: Sequence[FrozenConv], shortcut: FrozenConv | None = None, *, backend: str | None = None
) -> Tensor:
    """relu(layers(x) + shortcut(x)), with a ReLU between two layers (He et al. 2016, figure 5).

    Args:
        x: [B, C, H, W] float.
        layers: convolutions with frozen norms, one after the other.
        shortcut: the same for the other path; None is the identity.
        backend: "native" or "reference"; None takes the fastest that can run here. What is compiled or exported takes
            the reference, which torch can see into.

    Returns:
        [B, K, H', W'], of "native" channels last.

    Raises:
        ValueError: a shape or dtype is not as above.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Differentiable once in ``x`` and in every weight, not in scales and shifts. Where a map is exactly 0 after its ReLU,
    nothing passes back, as in PyTorch. In "native" 3x3 layers of stride 1 take Winograd's algorithm, back, and forward
    where nothing is recorded: against float64 the root mean square of the error, over that of the exact gradient, is
    7e-7, 1.4e-6 and 2.0e-6 for a map's gradient with 64, 256 and 512 channels (PyTorch's in float32: 4e-7, 8e-7,
    1.2e-6), and 7e-7, 6e-7, 6e-7 for the weight's of two maps of 80x80, 40x40, 20x20 (4e-7, 2e-7, 1e-7). Nothing waits
    for the device.
    """
    _check(x, layers, shortcut)
    if goes_through_dispatcher(x):
        return residual_block_reference(x, layers, shortcut)
    return OP.choose(backend, x).run(x, layers, shortcut)


def _check(x: Tensor, layers: Sequence[FrozenConv], shortcut: FrozenConv | None) -> None:
    if not layers:
        raise ValueError("layers must have at least one layer")
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    size = _check_path("layers", x, layers)
    other = tuple(x.shape[1:]) if shortcut is None else _check_path("shortcut", x, [shortcut])
    if size != other:
        raise ValueError(f"layers and shortcut must give maps of one size, got {list(size)} and {list(other)}")


def _check_path(name: str, x: Tensor, layers: Sequence[FrozenConv]) -> tuple[int, ...]:
    """The size [K, H', W'] of the path's result."""
    channels, height, width = x.shape[1:]
    for layer in layers:
        weight = layer.weight
        if weight.dim() != 4 or weight.shape[1] != channels or 0 in weight.shape:
            raise ValueError(f"{name} must have a weight [K, {channels}, R, S] here, got {list(weight.shape)}")
        channels = len(weight)
        for vector, tensor in (("scale", layer.scale), ("shift", layer.shift)):
            if list(tensor.shape) != [channels] or tensor.requires_grad:
                got = list(tensor.shape)
                raise ValueError(f"{name} must have a {vector} [{channels}] without a gradient, got {got}")
        for tensor in (weight, layer.scale, layer.shift):
            if tensor.device != x.device or (tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
                wanted, found = f"{x.dtype} on {x.device}", f"{tensor.dtype} on {tensor.device}"
                raise ValueError(f"{name} must be {wanted}, as x is, got {found}")
        height, width = layer.out_size(height, width)
        if min(height, width) < 1:
            raise ValueError(f"x must be at least as large as the kernels of {name}, got {list(x.shape)}")
    return channels, height, width
