"""Attention in Triton: the launches.

Its speed has not been measured: it was written and checked on machines without a GPU.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast.ops._triton import on_device
from detr_fast.ops._triton_dropout import word_threshold
from detr_fast.ops.attention.triton_backward import attention_bwd_key_value_kernel, attention_bwd_query_kernel
from detr_fast.ops.attention.triton_choices import SHORT, Choice, Kind, choice_for
from detr_fast.ops.attention.triton_forward import attention_fwd_kernel, attention_fwd_reduce_kernel
from detr_fast.ops.attention.types import AttentionInputs, TokenOffsets

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself reads it

# Strides are given in units of 8 elements, 16 bytes of the smallest dtype: the widest read there is.
UNIT = 8
# Keys are split among programs where there would be fewer than two programs a multiprocessor, each with a share of at
# least 128 keys: two or more steps of its loop.
PROGRAMS_PER_MULTIPROCESSOR = 2
LEAST_SHARE = 128
REDUCE_BLOCK = 32
# Elements of a head that a product of float32 takes at a time.
CHUNK = 16


def attention_triton(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The output, and the base 2 logarithms of the softmax's sums [H, Nq].

    One launch, or two where keys are split. Can be captured in a CUDA graph once a call outside of it has compiled the
    kernels; the graph holds the lengths.
    """
    launch = Launches(inputs)
    with on_device(inputs.query.device):
        return launch.forward()


def attention_triton_backward(
    inputs: AttentionInputs, grad: Tensor, out: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches, the first split over keys where that fills the device."""
    launch = Launches(inputs)
    with on_device(inputs.query.device):
        return launch.backward(grad, out, statistics)


class Launches:
    """The arguments of one call's launches."""

    def __init__(self, inputs: AttentionInputs) -> None:
        query, key, value, self.query_offsets, self.key_offsets, scale, dropout = inputs
        query = query.detach()
        # A highest product is the highest score only where the scale is positive.
        self.sign = 1.0 if scale > 0 else scale
        self.scale = scale if scale > 0 else 1.0
        self.all_queries, self.heads, self.size = query.shape
        self.unit = UNIT if self.size % UNIT == 0 else 1
        self.query = self._aligned(query if scale > 0 else query * scale)
        self.key, self.value = self._aligned(key.detach()), self._aligned(value.detach())
        self.dropout = dropout
        self.threshold = word_threshold(dropout)
        self.dropout_scale = 1.0 if dropout is None else dropout.scale
        self.kept_share = 1.0 if dropout is None else 1 - dropout.threshold / 65536

    def forward(self) -> tuple[Tensor, Tensor]:
        out = self.query.new_empty((self.all_queries, self.heads, self.size))
        statistics = self._statistics()
        choice = choice_for(self.kind("forward"))
        blocks, splits = self.grid(choice)
        if blocks == 0:
            return out, statistics
        parts, part_statistics = out, statistics
        if splits > 1:
            parts = statistics.new_empty((splits, *out.shape))
            part_statistics = statistics.new_empty((splits, *statistics.shape))
        attention_fwd_kernel[(blocks, self.heads, splits)](
            self.query,
            self.key,
            self.value,
            parts,
            part_statistics,
            *self._offsets_and_seed(),
            len(self.query_offsets.lengths),
            self.all_queries,
            self.heads,
            splits,
            self.threshold,
            self.dropout_scale,
            self.scale * math.log2(math.e),
            *self._strides(self.query, self.key, self.value),
            SPLIT=splits > 1,
            **self._constants(choice),
        )
        if splits > 1:
            self._reduce(parts, part_statistics, out, statistics, splits)
        return out, statistics

    def _reduce(self, parts: Tensor, part_statistics: Tensor, out: Tensor, statistics: Tensor, splits: int) -> None:
        grid = (triton.cdiv(self.all_queries, REDUCE_BLOCK), self.heads)
        attention_fwd_reduce_kernel[grid](
            parts,
            part_statistics,
            out,
            statistics,
            self.all_queries,
            self.heads,
            splits,
            SIZE=self.size,
            BLOCK_E=block_e(self.size),
            BLOCK=REDUCE_BLOCK,
            enable_fp_fusion=True,
        )

    def backward(self, grad: Tensor, out: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, out, delta = self._aligned(grad), out.contiguous(), self._statistics()
        dquery = self.query_gradient(grad, out, statistics, delta)
        return dquery, *self.key_value_gradient(grad, statistics, delta)

    def query_gradient(self, grad: Tensor, out: Tensor, statistics: Tensor, delta: Tensor) -> Tensor:
        """Fills ``delta`` on the way."""
        dquery = torch.empty_like(out)
        choice = choice_for(self.kind("query_gradient"))
        blocks, splits = self.grid(choice)
        if blocks == 0:
            return dquery
        parts = dquery if splits == 1 else statistics.new_empty((splits, *out.shape))
        attention_bwd_query_kernel[(blocks, self.heads, splits)](
            self.query,
            self.key,
            self.value,
            out,
            grad,
            statistics,
            delta,
            parts,
            *self._offsets_and_seed(),
            len(self.query_offsets.lengths),
            self.all_queries,
            self.heads,
            splits,
            self.threshold,
            self.kept_share,
            self.scale * self.sign * self.dropout_scale,
            self.scale * math.log2(math.e),
            *self._strides(self.query, self.key, self.value, grad),
            SPLIT=splits > 1,
            **self._constants(choice),
        )
        return dquery if splits == 1 else parts.sum(0).to(out.dtype)

    def key_value_gradient(self, grad: Tensor, statistics: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        dkey, dvalue = (self.query.new_empty((len(self.key), self.heads, self.size)) for _ in range(2))
        choice = choice_for(self.kind("key_value_gradient"))
        blocks = count_blocks(self.key_offsets, choice.keys)
        if blocks:
            attention_bwd_key_value_kernel[(blocks, self.heads)](
                self.query,
                self.key,
                self.value,
                grad,
                statistics,
                delta,
                dkey,
                dvalue,
                *self._offsets_and_seed(),
                len(self.query_offsets.lengths),
                self.all_queries,
                self.heads,
                self.threshold,
                self.dropout_scale,
                self.scale * self.dropout_scale,
                self.scale * math.log2(math.e),
                *self._strides(self.query, self.key, self.value, grad),
                **self._constants(choice),
            )
        return dkey, dvalue

    def _aligned(self, tokens: Tensor) -> Tensor:
        """As they lie, where kernels can read them so."""
        strides_fit = all(stride % self.unit == 0 for stride in tokens.stride()[:2])
        if tokens.stride(2) == 1 and strides_fit and tokens.data_ptr() % 16 == 0:
            return tokens
        return tokens.clone(memory_format=torch.contiguous_format)

    def _strides(self, *tensors: Tensor) -> list[int]:
        return [stride // self.unit for tokens in tensors for stride in tokens.stride()[:2]]

    def _statistics(self) -> Tensor:
        return self.query.new_empty((self.heads, self.all_queries), dtype=torch.float32)

    def _offsets_and_seed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        seed = None if self.dropout is None else self.dropout.seed
        return self.query_offsets.offsets, self.key_offsets.offsets, seed

    def kind(self, kernel: str) -> Kind:
        """What a kernel's choice is made for."""
        own_side = self.key_offsets if kernel == "key_value_gradient" else self.query_offsets
        short = own_side.max_length <= SHORT
        return Kind(kernel, block_e(self.size), self.query.dtype, self.dropout is not None, short)

    def grid(self, choice: Choice) -> tuple[int, int]:
        """Blocks of queries, and among how many programs the keys of each are split."""
        blocks = count_blocks(self.query_offsets, choice.queries)
        wanted = PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(self.query.device)
        most = self.key_offsets.max_length // LEAST_SHARE
        return blocks, max(1, min(wanted // max(1, blocks * self.heads), most))

    def _constants(self, choice: Choice) -> dict[str, Any]:
        dtype = self.query.dtype
        # Only tensor cores take bfloat16; the interpreter has none, and neither has numpy a bfloat16.
        dot = torch.float32 if dtype == torch.bfloat16 and INTERPRETED else dtype
        exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        return {
            "SIZE": self.size,
            "BLOCK_E": block_e(self.size),
            "UNIT": self.unit,
            "BLOCK_Q": choice.queries,
            "BLOCK_K": choice.keys,
            "DROPOUT": self.dropout is not None,
            "DOT": DTYPES[dot],
            "CHUNK": CHUNK if dtype == torch.float32 else 0,
            "PRECISION": "tf32x3" if exact else "tf32",
            "num_warps": choice.warps,
            "num_stages": choice.stages,
            "enable_fp_fusion": True,
        }


def block_e(size: int) -> int:
    """A head size up to a power of 2, of at least 16: what a product of tiles takes."""
    return max(16, 1 << (size - 1).bit_length())


def count_blocks(offsets: TokenOffsets, block: int) -> int:
    return sum((length + block - 1) // block for length in offsets.lengths)


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    # Under the interpreter as on an H100, so that what runs there is what is split there.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
