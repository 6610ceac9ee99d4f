"""The public op and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.conv.native import ALGORITHMS, conv_native, fits_winograd, panels_of, sizes_of, why_not
from detr_fast.ops.conv.reference import conv_reference
from detr_fast.ops.conv.types import (
    ConvInputs,
    PackedConv,
    check_map,
    check_no_gradient,
    check_out,
    check_same_kind,
    check_vector,
)

OP = Op(
    name="conv",
    implementations=(
        Implementation("native", conv_native, why_not),
        Implementation("reference", conv_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 1, 1, 1, device=device),),
)


def pack_conv(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> PackedConv:
    """``PackedConv.of`` a weight, times a factor for each channel such as a norm's, that keeps nothing of ``weight``.

    Args:
        weight, bias, stride, padding, dilation: as of ``PackedConv.of``.
        scale: [K] of the weight's dtype and device; None is 1.

    Raises:
        ValueError: as ``PackedConv.of``, and where ``scale`` is not as above.
    """
    place = {"stride": stride, "padding": padding, "dilation": dilation}
    packed = PackedConv.of(weight, bias, **place)
    if scale is not None:
        check_vector("scale", scale, weight)
        scale = scale.detach().contiguous()
    if goes_through_dispatcher(weight) or why_not(weight) is not None:
        product = weight.detach().clone() if scale is None else weight.detach() * scale[:, None, None, None]
        return PackedConv.of(product, bias, **place)
    # Packed at once: a product beside the weight would be as large, and leave holes in the heap when it goes.
    panels_of(packed, scale)
    return packed


def conv(
    x: Tensor,
    packed: PackedConv,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    algorithm: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A convolution with its bias, what is added to it, and the ReLU after it, or a ReLU's gradient.

    Maps lie in memory as [B, H, W, C] (``torch.channels_last``); those that are read and do not are copied.

    Args:
        x: [B, C, H, W] float.
        packed: the weight [K, C, R, S], bias, stride, padding and dilation.
        residual: [B, K, H', W'], what is added before the ReLU; may be ``out``.
        relu: whether negative numbers become zeros. NaN stays.
        gate: [B, K, H', W'], what a ReLU gave: where it is not above 0, nothing passes back through the ReLU, and the
            result is 0.
        out: [B, K, H', W'] channels last, where to write; may not share memory with ``x``.
        algorithm: of "native": "gemm", or "winograd" for 3x3 convolutions of stride 1 whose padding is their dilation,
            with a quarter of the multiplications (Lavin and Gray 2016, F(4x4, 3x3)); None takes the fastest for this
            layer. Rounding errors of "winograd" are twice those of a sum in float32 (their root mean square is 7e-7 of
            the result's for 64 channels, 1.6e-6 for 512), and a number that is not finite spoils the 4x4 pixels of the
            result around it.
        backend: "native" or "reference"; None takes the fastest that can run here. What is compiled or exported takes
            the reference, which torch can see into.

    Returns:
        [B, K, H', W'] channels last: ``out`` where it is given. float32 sums are formed in float32.

    Raises:
        ValueError: a shape, dtype or layout is not as above, or a gradient would be needed.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. On CUDA it does not wait for the device.
    """
    inputs = ConvInputs(x, packed, residual, relu, out, algorithm, gate)
    _check(inputs)
    if goes_through_dispatcher(x):
        return conv_reference(inputs)
    return OP.choose(backend, x).run(inputs)


def _check(inputs: ConvInputs) -> None:
    x, packed, residual, _, out, algorithm, gate = inputs
    check_map(x, packed)
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be None or one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm == "winograd" and not fits_winograd(sizes_of(packed, x.shape)):
        raise ValueError(f"algorithm 'winograd' needs 3x3, stride 1 and padding equal to dilation, got {packed}")
    shape = [len(x), packed.shape[0], *packed.out_size(*x.shape[2:])]
    for name, tensor in (("residual", residual), ("gate", gate)):
        if tensor is not None:
            check_same_kind(name, tensor, shape, x)
    check_out(out, shape, x, residual=residual, gate=gate)
    check_no_gradient(x=x, residual=residual, gate=gate, out=out)
