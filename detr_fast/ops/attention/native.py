"""Attention by csrc/cpu/attention.cpp and csrc/cpu/attention_backward.cpp.

What ``backend=None`` takes on the CPU. Measured with 8 heads of 32 in float32, two threads and AVX-512, medians of
alternating calls: PyTorch's SDPA on dense tensors takes 1.25 times as long on 850 tokens (with the backward 1.25), 1.29
on 1500 (1.22), 1.31 on 3400, 1.10 for 100 queries of 850 keys (1.19), 0.83 on 100 tokens (0.89), and on packed tokens
1.3 to 1.6 times. With dropout, where it stores the weights, it takes 2.0 to 7.0 times as long with the backward. The
forward runs at 223 to 252 GFLOP/s on 850 and more tokens; multiplications and additions alone reach 440.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_fast.ops import _native
from detr_fast.ops.attention.types import AttentionInputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(query: Tensor, seed: Tensor | None = None) -> str | None:
    if query.device.type != "cpu":
        return f"there is no native code for {query.device.type} devices"
    if query.dtype not in DTYPES:
        return f"its native code computes in float32, which is too little for {query.dtype}"
    size = query.shape[-1]
    if size % 8 != 0 or size > 128:
        return f"its native code is for head sizes that are multiples of 8 up to 128, not {size}"
    return _native.why_not(query.device)


def attention_native(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The output, and [H, Nq]: log2 of the sum over a query's keys of e^score."""
    arguments = _Arguments(inputs)
    out = torch.empty(inputs.query.shape)
    log_sum = torch.empty(out.shape[1], out.shape[0])
    _native.module().attention_cpu(arguments.native, out.data_ptr(), log_sum.data_ptr())
    return out.to(inputs.query.dtype), log_sum


def attention_native_backward(
    inputs: AttentionInputs, grad: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    arguments = _Arguments(inputs)
    forward = [x.float().contiguous() for x in (out, grad, log_sum)]
    grads = [torch.empty(x.shape) for x in inputs[:3]]
    _native.module().attention_backward_cpu(
        arguments.native, [x.data_ptr() for x in forward], [x.data_ptr() for x in grads]
    )
    grad_query, grad_key, grad_value = (x.to(inputs.query.dtype) for x in grads)
    return grad_query, grad_key, grad_value


class _Arguments:
    """Inputs as addresses, strides and numbers; holds the tensors that the addresses point into."""

    def __init__(self, inputs: AttentionInputs) -> None:
        query, key, value, query_offsets, key_offsets, scale, dropout = inputs
        self.tensors = [_readable(x) for x in (query, key, value)]
        self.native: Any = _native.module().AttentionInputs(
            *((x.data_ptr(), x.stride(0), x.stride(1)) for x in self.tensors),
            query_offsets.lengths,
            key_offsets.lengths,
            query.shape[1:],
            scale,
            0 if dropout is None else dropout.seed.data_ptr(),
            0 if dropout is None else dropout.threshold,
            1.0 if dropout is None else dropout.scale,
            torch.get_num_threads(),
        )


def _readable(x: Tensor) -> Tensor:
    """In float32, with stride 1 within a head."""
    x = x.detach().float()
    return x if x.stride(-1) == 1 else x.contiguous()
