"""The public op and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops._dispatch import Implementation, Op, always_runs, goes_through_dispatcher
from detr_fast.ops.attention import TokenOffsets
from detr_fast.ops.conv.types import check_no_gradient
from detr_fast.ops.transformer_layers.native import transformer_layers_native, why_not
from detr_fast.ops.transformer_layers.reference import transformer_layers_reference
from detr_fast.ops.transformer_layers.types import Norm, TransformerInputs, TransformerLayers

OP = Op(
    name="transformer_layers",
    implementations=(
        Implementation("native", transformer_layers_native, why_not),
        Implementation("reference", transformer_layers_reference, always_runs),
    ),
    example=lambda device: (torch.empty(1, 8, 32, device=device), torch.empty(2048, device=device)),
)


def transformer_layers(
    x: Tensor,
    pos: Tensor,
    query_pos: Tensor,
    layers: TransformerLayers,
    offsets: TokenOffsets,
    *,
    every_layer: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The encoder and the decoder of DETR in inference (Carion et al. 2020, appendix A.3).

    Positions are added to the queries and keys of every attention, never to the values. The decoder starts from zeros.

    Args:
        x: [N, D] float, the tokens of B images one behind the other. pos: [N, D], their positions.
        query_pos: [Q, D], the object queries' positions.
        layers: the weights, of the dtype and device of ``x``.
        offsets: where each image's tokens are. The queries of an image without tokens attend to nothing.
        every_layer: return the outputs of all decoder layers, not the last one's alone.
        backend: "native" or "reference"; None takes the fastest that can run here. What is compiled or exported takes
            the reference, which torch can see into.

    Returns:
        The decoder's outputs [L, B, Q, D] ([1, B, Q, D]) and the encoder's memory [N, D].

    Raises:
        ValueError: a shape or dtype is not as above, norms differ in ``eps``, or a gradient would be needed.
        NotImplementedError: ``backend`` cannot run these inputs; the message says why.

    Not differentiable. On CUDA it does not wait for the device.
    """
    inputs = TransformerInputs(x, pos, query_pos, layers, offsets, every_layer)
    _check(inputs)
    if goes_through_dispatcher(x):
        return transformer_layers_reference(inputs)
    return OP.choose(backend, *_asked_of(x, layers)).run(inputs)


def fits_native(x: Tensor, layers: TransformerLayers) -> bool:
    """Whether the call takes native code: what a model has its own layers for else."""
    return not goes_through_dispatcher(x) and OP.choose(None, *_asked_of(x, layers)).name == "native"


def _asked_of(x: Tensor, layers: TransformerLayers) -> tuple[Tensor, Tensor]:
    inner = layers.decoder[0].linear1.bias
    assert inner is not None
    return x.unflatten(1, (layers.num_heads, -1)), inner


def _check(inputs: TransformerInputs) -> None:
    x, pos, query_pos, layers, offsets, _ = inputs
    width = layers.norm.weight.shape[0]
    shapes = {"x": [sum(offsets.lengths), width], "pos": [sum(offsets.lengths), width]}
    shapes["query_pos"] = [query_pos.shape[0] if query_pos.ndim else 0, width]
    for name, shape in shapes.items():
        tensor = getattr(inputs, name)
        if list(tensor.shape) != shape or tensor.dtype != layers.norm.weight.dtype:
            expected = f"{layers.norm.weight.dtype} {shape}"
            raise ValueError(f"{name} must be {expected}, got {tensor.dtype} {list(tensor.shape)}")
    norms = [part for layer in (*layers.encoder, *layers.decoder) for part in layer if isinstance(part, Norm)]
    if any(norm.eps != layers.norm.eps for norm in norms):
        raise ValueError(f"norms must have one eps, got {sorted({norm.eps for norm in (*norms, layers.norm)})}")
    check_no_gradient(x=x, pos=pos, query_pos=query_pos)
