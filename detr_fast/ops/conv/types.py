"""What ``conv`` takes: a convolution's weight, made ready once for all calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class PackedConv:
    """A convolution's weight and bias, and the forms of them that native kernels read, made when first asked for.

    Weight and bias must not change afterwards. It can be pickled and used by several threads at once; of the forms each
    process makes its own.

    Attributes:
        weight: [K, C, R, S] float, contiguous.
        bias: [K] of the weight's dtype and device, or None.
        stride, padding, dilation: the same in both directions.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int) -> None:
        self.weight, self.bias = weight, bias
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self._forms: dict[str, Tensor] = {}

    @staticmethod
    def of(
        weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0, dilation: int = 1
    ) -> PackedConv:
        """Of a convolution in one group; weight and bias are copied only where they are not contiguous.

        Raises:
            ValueError: a shape or dtype is not as above, or stride, padding or dilation are too small.
        """
        if weight.ndim != 4 or not weight.is_floating_point() or 0 in weight.shape:
            got = f"{weight.dtype} {list(weight.shape)}"
            raise ValueError(f"weight must be float [K, C, R, S] without a zero, got {got}")
        if bias is not None and (
            list(bias.shape) != [len(weight)] or bias.dtype != weight.dtype or bias.device != weight.device
        ):
            wanted, got = f"{weight.dtype} [{len(weight)}] on {weight.device}", f"{bias.dtype} {list(bias.shape)}"
            raise ValueError(f"bias must be {wanted}, as the weight is, got {got} on {bias.device}")
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
        plain = None if bias is None else bias.detach().contiguous()
        return PackedConv(weight.detach().contiguous(), plain, stride, padding, dilation)

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result for a map of these; not positive where the kernel does not fit into it."""
        spans = (self.dilation * (side - 1) + 1 for side in self.weight.shape[2:])
        rows, columns = (
            (length + 2 * self.padding - span) // self.stride + 1
            for length, span in zip((height, width), spans, strict=True)
        )
        return rows, columns

    def form(self, algorithm: str, make: Callable[[PackedConv], Tensor]) -> Tensor:
        """The weight as ``algorithm`` reads it; ``make`` is called the first time."""
        # Two threads that ask at once may both make it, and both are right.
        if algorithm not in self._forms:
            self._forms[algorithm] = make(self)
        return self._forms[algorithm]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": {}}

    def __repr__(self) -> str:
        shape = "x".join(str(side) for side in self.weight.shape)
        return f"PackedConv({shape}, stride={self.stride}, padding={self.padding}, dilation={self.dilation})"


class ConvInputs(NamedTuple):
    """A call of ``conv``, checked, as its implementations take it."""

    x: Tensor  # [B, C, H, W]
    packed: PackedConv
    residual: Tensor | None  # [B, K, H', W']
    relu: bool
    out: Tensor | None  # [B, K, H', W'], channels last
    algorithm: str | None
