"""What ``conv_int8`` takes: a convolution's weight in 8-bit integers, made ready once for all calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.conv.types import check_vector, out_size

# Of csrc/cpu/int8_tile.h.
PANEL_COLUMNS = 64
DEPTH_STEP = 64
# So many products of 255 and 127 have a sum below 2^31.
MOST_DEPTH = (2**31 - 1) // (255 * 127)


class Steps(NamedTuple):
    """Which numbers the bytes of a map stand for: byte b for (b - zero) * size."""

    size: float
    zero: int = 0

    @staticmethod
    def of(lowest: float, highest: float) -> Steps:
        """Those that reach from ``lowest`` to ``highest``: from 0 up, or as far below 0 as above."""
        if lowest >= 0:
            return Steps(max(highest, 1e-30) / 255)
        return Steps(max(-lowest, highest) / 127, 128)


class PackedConvInt8:
    """A convolution of bytes: y = factor * sum(x * weight) + bias + residual_factor * residual.

    What the bytes of maps stand for is in factor and bias. A weight's 255 steps reach from minus the largest of its out
    channel to it. It can be pickled and used by several threads at once.

    Attributes:
        shape: of the weight, (K, C, R, S).
        panels: the weight, int8, in the order of csrc/cpu/int8_tile.h.
        factor, bias: float32 of K numbers and zeros up to a multiple of 64.
        residual_factor: of the bytes that are added.
        is_float: the result is float32; otherwise it is rounded to bytes, those below 0 to 0 and above 255 to 255.
        stride, padding, dilation: the same in both directions.
    """

    def __init__(
        self,
        shape: torch.Size,
        panels: Tensor,
        factor: Tensor,
        bias: Tensor,
        residual_factor: float,
        is_float: bool,
        place: tuple[int, int, int],
    ) -> None:
        self.shape, self.panels, self.factor, self.bias = shape, panels, factor, bias
        self.residual_factor, self.is_float = residual_factor, is_float
        self.stride, self.padding, self.dilation = place

    @staticmethod
    def of(
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        x: Steps,
        out: Steps | None = None,
        residual: Steps | None = None,
        place: tuple[int, int, int] = (1, 0, 1),
    ) -> PackedConvInt8:
        """Of a convolution in one group of maps whose bytes mean what ``x``, ``out`` and ``residual`` say.

        Args:
            weight: [K, C, R, S] float.
            bias: [K] of the weight's dtype and device.
            x: its ``zero`` is 0, because that is what stands around the map.
            out: None for a result in float32.
            place: stride, padding and dilation.

        Raises:
            ValueError: a shape or dtype is not as above, or a sum of so many products might not fit in 32 bits.
        """
        if weight.ndim != 4 or not weight.is_floating_point() or 0 in weight.shape:
            raise ValueError(
                f"weight must be float [K, C, R, S] without a zero, got {weight.dtype} {list(weight.shape)}"
            )
        if weight[0].numel() > MOST_DEPTH:
            raise ValueError(f"weight must have at most {MOST_DEPTH} numbers a channel, got {list(weight.shape)}")
        if x.zero != 0:
            raise ValueError(f"x must have its zero at 0, got {x}")
        if bias is not None:
            check_vector("bias", bias, weight)
        weight = weight.detach().float()
        step = (weight.abs().amax((1, 2, 3)) / 127).clamp_min(1e-30)
        numbers = (weight / step[:, None, None, None]).round().to(torch.int8)
        size, zero = (1.0, 0) if out is None else out
        shift = torch.zeros_like(step) if bias is None else bias.detach().float() / size
        residual_factor = 0.0 if residual is None else residual.size / size
        shift = shift + zero - residual_factor * (0 if residual is None else residual.zero)
        factor, shift = (_padded(vector, PANEL_COLUMNS) for vector in (step * (x.size / size), shift))
        return PackedConvInt8(weight.shape, _panels(numbers), factor, shift, residual_factor, out is None, place)

    @property
    def weight(self) -> Tensor:
        """[K, C, R, S] int8, a copy."""
        out_channels, channels, height, width = self.shape
        rows = self.panels.view(-1, self._depth // 4, PANEL_COLUMNS, 4).transpose(1, 2).reshape(-1, self._depth)
        numbers = rows[:out_channels, : height * width * channels]
        return numbers.reshape(out_channels, height, width, channels).permute(0, 3, 1, 2).contiguous()

    @property
    def device(self) -> torch.device:
        return self.panels.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return torch.float32 if self.is_float else torch.uint8

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result for a map of these; not positive where the kernel does not fit into it."""
        return out_size(self, height, width)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> PackedConvInt8:
        """The same with ``fn`` applied to its tensors, such as a move to another device; dtypes stay."""
        panels, factor, bias = (fn(tensor).to(tensor.dtype) for tensor in (self.panels, self.factor, self.bias))
        place = (self.stride, self.padding, self.dilation)
        return PackedConvInt8(self.shape, panels, factor, bias, self.residual_factor, self.is_float, place)

    @property
    def _depth(self) -> int:
        return self.panels.numel() // self.factor.numel()

    def __repr__(self) -> str:
        shape = "x".join(str(side) for side in self.shape)
        return f"PackedConvInt8({shape}, stride={self.stride}, padding={self.padding}, dilation={self.dilation})"


class ConvInt8Inputs(NamedTuple):
    """A call of ``conv_int8``, checked, as its implementations take it."""

    x: Tensor  # [B, C, H, W] uint8
    packed: PackedConvInt8
    residual: Tensor | None  # [B, K, H', W'] uint8
    relu: bool
    out: Tensor | None  # [B, K, H', W'], channels last
    instructions: str | None


def _panels(numbers: Tensor) -> Tensor:
    """[K, C, R, S] int8: for every 64 columns and 4 numbers in depth, those of each column; zeros beyond both ends."""
    rows = numbers.permute(0, 2, 3, 1).reshape(len(numbers), -1)
    depth = -(-rows.shape[1] // DEPTH_STEP) * DEPTH_STEP
    columns = -(-len(rows) // PANEL_COLUMNS) * PANEL_COLUMNS
    whole = F.pad(rows, (0, depth - rows.shape[1], 0, columns - len(rows)))
    return whole.view(-1, PANEL_COLUMNS, depth // 4, 4).transpose(1, 2).contiguous().view(-1)


def _padded(vector: Tensor, multiple: int) -> Tensor:
    return F.pad(vector, (0, -len(vector) % multiple))
