"""Forward and backward of the op on the convolutions of ``detr_fast.ops.conv``.

Every ReLU, its gradient, and the sums of maps and of gradients happen where a convolution writes its result. Weights
are packed anew for every call, the norm's factor with them: they change with every update.
"""

# torch's Functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.conv import native as conv
from detr_fast.ops.residual_block.types import FrozenConv

Layers = Sequence[FrozenConv]
# Where a gradient is asked for, maps are formed with sums: Winograd's rounding opens and closes more ReLUs, which moved
# norms of a ResNet-50's gradients by 3e-4.
RECORDED = "gemm"


def why_not(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"there is no native code for {x.device.type} devices"
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return "its native code is for float32, without autocast"
    return _native.why_not(x.device)


def residual_block_native(x: Tensor, layers: Layers, shortcut: FrozenConv | None) -> Tensor:
    weights = [layer.weight for layer in (*layers, *(() if shortcut is None else (shortcut,)))]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)):
        return _ResidualBlock.apply(x, tuple(layers), shortcut, *weights)
    x = y = x.detach().contiguous(memory_format=torch.channels_last)
    for layer in layers[:-1]:
        y = _forward(y, layer, relu=True)
    return _end(x, y, layers[-1], shortcut)


def _end(x: Tensor, y: Tensor, last: FrozenConv, shortcut: FrozenConv | None, algorithm: str | None = None) -> Tensor:
    if shortcut is None:
        return _forward(y, last, residual=x, relu=True, algorithm=algorithm)
    residual = _forward(x, shortcut, algorithm=algorithm)
    return _forward(y, last, residual=residual, relu=True, out=residual, algorithm=algorithm)


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, shortcut, *weights):
        maps = [x.contiguous(memory_format=torch.channels_last)]
        for layer in layers[:-1]:
            maps.append(_forward(maps[-1], layer, relu=True, algorithm=RECORDED))
        out = _end(maps[0], maps[-1], layers[-1], shortcut, RECORDED)
        ctx.layers, ctx.shortcut = layers, shortcut
        # The weights stand in the layers, too: here torch sees where one is changed before the backward pass.
        ctx.save_for_backward(*maps, out, *weights)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        layers, shortcut = ctx.layers, ctx.shortcut
        maps, out = ctx.saved_tensors[: len(layers)], ctx.saved_tensors[len(layers)]
        needs_x, _, _, *needs_weight = ctx.needs_input_grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_sum = of_map = torch.ops.aten.threshold_backward(grad, out, 0)
        of_weights = [None] * len(needs_weight)
        for i in reversed(range(len(layers))):
            if needs_weight[i]:
                of_weights[i] = _weight_gradient(of_map, maps[i], layers[i])
            if i > 0:
                of_map = _map_gradient(of_map, maps[i], layers[i], gate=maps[i])
        if shortcut is not None and needs_weight[-1]:
            of_weights[-1] = _weight_gradient(of_sum, maps[0], shortcut)
        of_x = None
        if needs_x:
            of_x = _map_gradient(of_map, maps[0], layers[0], residual=of_sum if shortcut is None else None)
            of_x = of_x if shortcut is None else _add_map_gradient(of_x, of_sum, shortcut)
        return of_x, None, None, *of_weights


def _forward(
    x: Tensor,
    layer: FrozenConv,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
    algorithm: str | None = None,
) -> Tensor:
    """The layer of a channels-last map."""
    sizes = conv.sizes_of(layer, x.shape)
    algorithm = algorithm or conv.fastest(sizes)
    panels = conv.pack(sizes, layer.weight.detach().contiguous(), layer.scale.contiguous())
    return conv.run(algorithm, sizes, x, panels, layer.shift.contiguous(), residual, None, relu, out)


def _backward(
    grad: Tensor,
    layer: FrozenConv,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of a map that a layer of stride 1 takes, which is a convolution of that of its result."""
    sizes = conv.sizes_of(_adjoint(layer), grad.shape)
    algorithm = conv.fastest(sizes)
    panels = conv.pack(sizes, layer.weight.detach().contiguous(), layer.scale.contiguous(), adjoint=True)
    return conv.run(algorithm, sizes, grad, panels, None, residual, gate, False, out)


def _adjoint(layer: FrozenConv) -> FrozenConv:
    """A layer of the sizes of the one that takes the gradient back."""
    padding = layer.dilation * (layer.weight.shape[2] - 1) - layer.padding
    return layer._replace(weight=layer.weight.detach().transpose(0, 1), padding=padding)


def _map_gradient(
    grad: Tensor, x: Tensor, layer: FrozenConv, *, gate: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Of the layer's input ``x``, plus ``residual``; with ``gate`` back through the ReLU that gave it."""
    if layer.stride == 1:
        return _backward(grad, layer, residual=residual, gate=gate)
    of_x = _by_torch(grad, x, layer, (True, False))[0]
    of_x = of_x if residual is None else of_x.add_(residual)
    return of_x if gate is None else torch.ops.aten.threshold_backward(of_x, gate, 0)


def _add_map_gradient(of_x: Tensor, grad: Tensor, layer: FrozenConv) -> Tensor:
    """Add to ``of_x``, a gradient that nobody else has, what comes through another layer."""
    if layer.stride == 1:
        return _backward(grad, layer, residual=of_x, out=of_x)
    if _is_1x1(layer):
        of_x[:, :, :: layer.stride, :: layer.stride] += _backward(grad, layer._replace(stride=1))
        return of_x
    return of_x.add_(_by_torch(grad, of_x, layer, (True, False))[0])


def _is_1x1(layer: FrozenConv) -> bool:
    return layer.weight.shape[2:] == (1, 1) and layer.padding == 0


def _weight_gradient(grad: Tensor, x: Tensor, layer: FrozenConv) -> Tensor:
    """As the weight, contiguous."""
    sizes = conv.sizes_of(layer, x.shape)
    if conv.fastest(sizes) == "winograd":
        return conv.winograd_weight_gradient(sizes, x, grad, layer.scale.contiguous())
    if _is_1x1(layer):
        seen = x[:, :, :: layer.stride, :: layer.stride]
        of_weight = _by_pixels(grad).t().mm(_by_pixels(seen)).view(layer.weight.shape)
    else:
        of_weight = _by_torch(grad, x, layer, (False, True))[1].contiguous()
    return of_weight.mul_(layer.scale[:, None, None, None])


def _by_pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B * H * W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _by_torch(grad: Tensor, x: Tensor, layer: FrozenConv, wanted: tuple[bool, bool]) -> list[Tensor]:
    """PyTorch's gradients of the map and of the scaled weight."""
    sizes = [layer.stride] * 2, [layer.padding] * 2, [layer.dilation] * 2
    weight = layer.scaled().detach().contiguous(memory_format=torch.channels_last)
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, False, [0, 0], 1, [*wanted, False])
