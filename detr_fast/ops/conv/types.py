"""What ``conv`` takes: a convolution's weight, made ready once for all calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from detr_fast.ops._dispatch import goes_through_dispatcher

PANEL_COLUMNS = 64  # of csrc/cpu/gemm_tile.h


class PackedConv:
    """A convolution's weight and bias, the weight in the order in which native kernels read it once one has asked.

    Weight and bias must not change afterwards. It can be pickled and used by several threads at once.

    Attributes:
        shape, dtype, device: of the weight; the shape is (K, C, R, S).
        bias: [K] of the weight's dtype and device, or None.
        stride, padding, dilation: the same in both directions.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.bias, self.stride, self.padding, self.dilation = bias, stride, padding, dilation
        self._weight: Tensor | None = weight
        self._made: dict[str, Tensor] = {}

    @staticmethod
    def of(
        weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0, dilation: int = 1
    ) -> PackedConv:
        """Of a convolution in one group; weight and bias are copied only where they are not contiguous.

        On a GPU the weight lies as [K, R, S, C].

        Raises:
            ValueError: a shape or dtype is not as above, or stride, padding or dilation are too small.
        """
        if weight.ndim != 4 or not weight.is_floating_point() or 0 in weight.shape:
            got = f"{weight.dtype} {list(weight.shape)}"
            raise ValueError(f"weight must be float [K, C, R, S] without a zero, got {got}")
        if bias is not None:
            check_vector("bias", bias, weight)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
        plain = None if bias is None else bias.detach().contiguous()
        # As the maps lie, where a library computes: cuDNN would turn the weight at every call.
        layout = torch.contiguous_format if weight.device.type == "cpu" else torch.channels_last
        packed = weight.detach().contiguous(memory_format=layout)
        return PackedConv(packed, plain, stride, padding, dilation)

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result for a map of these; not positive where the kernel does not fit into it."""
        return out_size(self, height, width)

    @property
    def weight(self) -> Tensor:
        """[K, C, R, S] contiguous; a copy where it is kept in panels."""
        weight = self._weight  # read once: another thread may put panels in its place
        return self._from_panels(self._made["panels"]) if weight is None else weight

    def panels(self, make: Callable[[PackedConv, Tensor], Tensor]) -> Tensor:
        """The weight as csrc/cpu/gemm_tile.h describes it, in place of the weight itself.

        ``make`` makes it of this object and the weight, the first time.
        """
        weight = self._weight
        if weight is not None:
            # Two threads that ask at once may both make it; both get the first one, which lives as long as this object.
            with torch.inference_mode(False):
                self._made.setdefault("panels", make(self, weight))
            self._weight = None
        return self._made["panels"]

    def _from_panels(self, panels: Tensor) -> Tensor:
        out_channels, channels, height, width = self.shape
        by_channel = panels.view(-1, height * width, channels, PANEL_COLUMNS).permute(0, 3, 2, 1)
        return by_channel.reshape(-1, channels, height, width)[:out_channels].contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": self.weight, "_made": {}}

    def __repr__(self) -> str:
        shape = "x".join(str(side) for side in self.shape)
        return f"PackedConv({shape}, stride={self.stride}, padding={self.padding}, dilation={self.dilation})"


class Convolution(Protocol):
    """What the size of a convolution's result depends on; ``shape`` is the weight's (K, C, R, S)."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def stride(self) -> int: ...
    @property
    def padding(self) -> int: ...
    @property
    def dilation(self) -> int: ...


def out_size(conv: Convolution, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the result for a map of these; not positive where the kernel does not fit into it."""
    # Written out, because every call asks three times: a loop over both sides takes four times as long.
    _, _, kernel_height, kernel_width = conv.shape
    twice, stride, dilation = 2 * conv.padding, conv.stride, conv.dilation
    rows = (height + twice - dilation * (kernel_height - 1) - 1) // stride + 1
    columns = (width + twice - dilation * (kernel_width - 1) - 1) // stride + 1
    return rows, columns


class ConvInputs(NamedTuple):
    """A call of ``conv``, checked, as its implementations take it."""

    x: Tensor  # [B, C, H, W]
    packed: PackedConv
    residual: Tensor | None  # [B, K, H', W']
    relu: bool
    out: Tensor | None  # [B, K, H', W'], channels last
    algorithm: str | None
    gate: Tensor | None = None  # [B, K, H', W']


def check_vector(name: str, vector: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless ``vector`` has a number for each of the weight's output channels."""
    if list(vector.shape) != [len(weight)] or vector.dtype != weight.dtype or vector.device != weight.device:
        wanted, got = f"{weight.dtype} [{len(weight)}] on {weight.device}", f"{vector.dtype} {list(vector.shape)}"
        raise ValueError(f"{name} must be {wanted}, as the weight is, got {got} on {vector.device}")


def check_map(x: Tensor, packed: PackedConv) -> None:
    """Raise ValueError unless ``x`` can be convolved. Like the next ones it reads metadata only."""
    if x.ndim != 4 or x.shape[1] != packed.shape[1] or 0 in x.shape[1:]:
        raise ValueError(f"x must be [B, {packed.shape[1]}, H, W] with pixels, got {list(x.shape)}")
    if x.dtype != packed.dtype or x.device != packed.device:
        wanted, got = f"{packed.dtype} on {packed.device}", f"{x.dtype} on {x.device}"
        raise ValueError(f"x must be {wanted}, as the weight is, got {got}")
    if min(packed.out_size(*x.shape[2:])) < 1:
        raise ValueError(f"x must be at least as large as the kernel of {packed}, got {list(x.shape)}")


def check_same_kind(name: str, tensor: Tensor, shape: list[int], x: Tensor) -> None:
    """Raise ValueError unless a tensor has this shape and is of the map's dtype and device."""
    if list(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
        got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must be {x.dtype} {shape} on {x.device}, got {got}")


def check_out(out: Tensor | None, shape: list[int], x: Tensor, **read_with_it: Tensor | None) -> None:
    """Raise ValueError unless results can be written to ``out`` while the others are read, some at the same place."""
    if out is None:
        return
    check_same_kind("out", out, shape, x)
    check_place(out, x, **read_with_it)


def check_place(out: Tensor, x: Tensor, **read_with_it: Tensor | None) -> None:
    """Raise ValueError unless ``out`` lies as ``check_out`` wants it."""
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out must be channels last (torch.channels_last), got strides {out.stride()}")
    if goes_through_dispatcher(x):
        return
    if share_memory(x, out):
        raise ValueError("out must not share memory with x")
    for name, tensor in read_with_it.items():
        if tensor is None or tensor is out:
            continue
        if share_memory(tensor, out) and not _same_memory(tensor, out):
            raise ValueError(f"out must be {name} itself or not share memory with it")


def check_no_gradient(**tensors: Tensor | None) -> None:
    """Raise ValueError where autograd would want a gradient of one."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values()):
        raise ValueError(f"{', '.join(tensors)} must not require a gradient: there is none (use torch.no_grad())")


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from a tensor's first number to its last one overlaps another's."""
    (a_first, a_end), (b_first, b_end) = _span(a), _span(b)
    return a_first < b_end and b_first < a_end


def _span(tensor: Tensor) -> tuple[int, int]:
    count, first = tensor.numel(), tensor.data_ptr()
    if count == 0:
        return 0, 0
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return first, first + count * tensor.element_size()
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (steps + 1) * tensor.element_size()
