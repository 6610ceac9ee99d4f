"""The public op and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.conv import PackedConv
from detr_fast.ops.conv.types import check_map, check_no_gradient, check_out
from detr_fast.ops.conv_max_pool.native import conv_max_pool_native, why_not
from detr_fast.ops.conv_max_pool.reference import conv_max_pool_reference

OP = Op(
    name="conv_max_pool",
    implementations=(
        Implementation("native", conv_max_pool_native, why_not),
        Implementation("reference", conv_max_pool_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, 1, device=device),),
)


def conv_max_pool(x: Tensor, packed: PackedConv, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """A convolution with its bias, ReLU, and the highest of every 3x3 pixels with stride 2 and padding 1, in inference.

    The stem of a ResNet (He et al. 2016, table 1). The map between is never stored: at 800x1066 it has 55 MB.

    Args:
        x: [B, C, H, W] float, of any strides.
        packed: the weight [K, C, R, S], bias, stride and padding; without dilation.
        out: [B, K, H', W'] channels last, where to write; may not share memory with ``x``.
        backend: "native" or "reference"; None takes the fastest that can run here. What is compiled or exported takes
            the reference, which torch can see into.

    Returns:
        [B, K, H', W'] channels last, half as many rows and columns as the convolution has, rounded up: ``out`` where it
        is given. NaN stays.

    Raises:
        ValueError: a shape, dtype or layout is not as above, or a gradient would be needed.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. On CUDA it does not wait for the device.
    """
    if packed.dilation != 1:
        raise ValueError(f"packed must be without dilation, got {packed}")
    check_map(x, packed)
    rows, columns = ((length + 1) // 2 for length in packed.out_size(*x.shape[2:]))
    check_out(out, [len(x), packed.shape[0], rows, columns], x)
    check_no_gradient(x=x, out=out)
    if goes_through_dispatcher(x):
        return conv_max_pool_reference(x, packed, out)
    return OP.choose(backend, x).run(x, packed, out)
