"""Inputs of attention that its tests share: awkward lengths, and parts of one wider tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops import Dropout, TokenOffsets
from detr_fast.ops.attention.types import AttentionInputs
from detr_fast.ops.dropout import attention_keep_mask


class Shape(NamedTuple):
    heads: int
    size: int  # of a head
    queries: list[int]  # of each image
    keys: list[int]


SHAPES = {
    "one query": Shape(2, 32, [1], [5]),
    "one query and one key": Shape(1, 16, [1], [1]),
    "no keys in one image": Shape(2, 32, [3, 4, 2], [2, 0, 7]),
    "no queries in one image": Shape(2, 16, [3, 0, 2], [2, 6, 7]),
    "no keys at all": Shape(1, 16, [3, 2], [0, 0]),
    "no tokens": Shape(2, 16, [0, 0], [0, 0]),
    "no images": Shape(2, 16, [], []),
    "equal lengths": Shape(2, 32, [10, 10, 10], [33, 33, 33]),
    "not a multiple of the block": Shape(1, 32, [65, 17], [67, 129]),
    "an odd head size": Shape(2, 24, [9, 3], [12, 35]),
    "small heads": Shape(2, 8, [9, 3], [12, 35]),
    "large heads": Shape(1, 128, [9, 3], [12, 35]),
}
ORDINARY = Shape(2, 32, [37, 5], [70, 33])


def make_inputs(shape: Shape, dtype: torch.dtype = torch.float32, p: float | None = None) -> AttentionInputs:
    """Tokens are parts of wider tensors, as a projection of queries, keys and values together leaves them."""
    heads, size, queries, keys = shape
    query = torch.randn(sum(queries), 2 * heads, size)[:, heads:]
    key, value = torch.randn(sum(keys), 2, heads, size).unbind(1)
    offsets = TokenOffsets.of(queries, "cpu"), TokenOffsets.of(keys, "cpu")
    tensors = [as_parts(x.to(dtype)) for x in (query * 2, key, value)]  # softmaxes that are far from even
    return AttentionInputs(*tensors, *offsets, size**-0.5, None if p is None else Dropout.draw(p, torch.device("cpu")))


def as_parts(x: Tensor) -> Tensor:
    """The same numbers with a gap after every token."""
    wide = x.new_full((x.shape[0], 2 * x.shape[1], x.shape[2]), float("nan"))
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def in_double(inputs: AttentionInputs) -> AttentionInputs:
    return inputs._replace(query=inputs.query.double(), key=inputs.key.double(), value=inputs.value.double())


def oracle(inputs: AttentionInputs) -> Tensor:
    """PyTorch's SDPA image by image; what dropout drops is dropped from weights that SDPA gives for one-hot values."""
    outputs, dropout = [inputs.query[:0]], inputs.dropout
    images = zip(
        inputs.query.split(inputs.query_offsets.lengths),
        inputs.key.split(inputs.key_offsets.lengths),
        inputs.value.split(inputs.key_offsets.lengths),
        strict=True,
    )
    for image, (q, k, v) in enumerate(images):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        if k.shape[2] == 0:
            out = torch.zeros_like(q)
        elif dropout is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=inputs.scale)
        else:
            one_hot = torch.eye(k.shape[2], dtype=q.dtype).expand(1, q.shape[1], -1, -1)
            weights = F.scaled_dot_product_attention(q, k, one_hot, scale=inputs.scale)
            out = weights * attention_keep_mask(dropout, image, *weights.shape[1:]) * dropout.scale @ v
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def gradients(run: Callable[[AttentionInputs], Tensor], inputs: AttentionInputs, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = run(AttentionInputs(*leaves, *inputs[3:]))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)]


def assert_as_exact_as(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], why: str = "") -> None:
    """Errors at most twice theirs, and what the rounding of scores and of cancelling sums comes to.

    A score of up to 8 is rounded by up to 4 eps, and so changes its weight by as much relatively; with the exponential
    and the sums a result may be off by 12 eps of the largest number. Gradients are differences of sums of E products,
    and so of order E^0.5, however small they are themselves. Where there are enough numbers, their errors' mean square
    is held to theirs, too, and to the rounding of sums of E numbers. In 60,000 cases the largest error took three
    quarters of what is allowed; with a third of the allowance, as many as 1 in 500 failed.
    """
    for name, x, y, z in zip(("out", "dquery", "dkey", "dvalue"), ours, theirs, exact, strict=True):
        assert x.shape == z.shape and x.dtype == y.dtype
        if z.numel() == 0:
            continue
        cancelling = 16 * z.shape[-1] ** 0.5 if name in ("dquery", "dkey") else 0.0
        rounding = torch.finfo(x.dtype).eps * (12 * z.abs().max() + cancelling)
        error, allowed = (x.double() - z).abs().max(), 2 * (y.double() - z).abs().max() + rounding
        assert error <= allowed, f"{name} {why}: {error} > {allowed}"
        if z.numel() >= 1000:
            of_sums = torch.finfo(x.dtype).eps * (1 + z.shape[-1] ** 0.5 / 4)
            error, allowed = _deviation(x, z), 2 * _deviation(y, z) + of_sums
            assert error <= allowed, f"deviation of {name} {why}: {error} > {allowed}"


def _deviation(x: Tensor, exact: Tensor) -> Tensor:
    return (x.double() - exact).square().mean().sqrt()
