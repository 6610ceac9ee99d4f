"""Feature maps as tokens without padding, one image behind the other, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detr_fast.data.batch import Size
from detr_fast.ops import TokenOffsets


@dataclass(frozen=True)
class TokenLayout:
    """Which cells of B padded maps are tokens, and where each image's tokens lie.

    Attributes:
        batch: B.
        frame: (h, w) of the padded maps.
        offsets: the images' tokens: N of them, in the order of images, rows and columns. None where a graph is traced
            for any number of images; every cell then is a token.
        index: [N] int64, each token's place among the B * h * w cells; None where every cell is a token.
        padding: [B, h * w] bool, True = a token that stands for padding and that nothing may attend to; None where
            there are none, as it is wherever the host knows what is padding.
    """

    batch: int
    frame: Size
    offsets: TokenOffsets | None
    index: Tensor | None = None
    padding: Tensor | None = None

    @staticmethod
    def full(batch: int, frame: Size, device: torch.device, padding: Tensor | None = None) -> TokenLayout:
        """Every cell is a token."""
        # A symbol, in a graph that is traced, must not become a number.
        known = type(batch) is int
        offsets = TokenOffsets.equal(batch, frame[0] * frame[1], device) if known else None
        return TokenLayout(batch, frame, offsets, None, padding)

    @staticmethod
    def of(mask: Tensor, sizes: Sequence[Size] | None = None, device: torch.device | None = None) -> TokenLayout:
        """The valid cells of a batch.

        Without ``sizes`` a mask on the CPU is read, whatever its form. On another device, or where a graph is traced,
        reading it would wait or break the graph: every cell then is a token, and ``padding`` keeps the others from
        attending to those of the padding.

        Args:
            mask: [B, h, w] bool, True = padding.
            sizes: B (height, width) in cells: rectangles in the top left corner that are valid.
            device: of the tokens, that of ``mask`` where None.
        """
        device = mask.device if device is None else device
        batch, height, width = mask.shape
        frame = (height, width)
        if sizes is not None:
            if all(size == frame for size in sizes):
                return TokenLayout.full(batch, frame, device)
            cells = torch.arange(batch * height * width).view(batch, height, width)
            parts = [image[:h, :w].flatten() for image, (h, w) in zip(cells, sizes, strict=True)]
            return TokenLayout._packed([h * w for h, w in sizes], frame, torch.cat(parts), device)
        if mask.device.type != "cpu" or torch.compiler.is_compiling() or type(mask) is not Tensor:
            return TokenLayout.full(batch, frame, device, mask.flatten(1))
        valid = ~mask.flatten(1)
        lengths = valid.sum(1).tolist()  # the mask is on the host, and so are the next line's indices
        index = valid.flatten().nonzero()[:, 0]
        if len(index) == mask.numel():
            return TokenLayout.full(batch, frame, device)
        return TokenLayout._packed(lengths, frame, index, device)

    @staticmethod
    def _packed(lengths: list[int], frame: Size, index: Tensor, device: torch.device) -> TokenLayout:
        if device.type == "cuda":
            index = index.pin_memory()  # a copy from memory that is not pinned waits for the device
        offsets = TokenOffsets.of(lengths, device)
        return TokenLayout(len(lengths), frame, offsets, index.to(device, non_blocking=True))

    def pack(self, maps: Tensor) -> Tensor:
        """[B, D, h, w] to the tokens [N, D]."""
        cells = maps.flatten(2).transpose(1, 2).flatten(0, 1)  # [B * h * w, D]
        return cells if self.index is None else cells.index_select(0, self.index)

    def unpack(self, tokens: Tensor) -> Tensor:
        """[N, D] to [B, D, h, w], zero where there is no token."""
        cells = tokens
        if self.index is not None:
            zeros = tokens.new_zeros((self.batch * self.frame[0] * self.frame[1], tokens.shape[1]))
            cells = zeros.index_copy(0, self.index, tokens)
        if self.padding is not None:
            cells = cells.masked_fill(self.padding.flatten()[:, None], 0)
        return cells.unflatten(0, (-1, *self.frame)).permute(0, 3, 1, 2)

    def without_padding(self, tokens: Tensor) -> tuple[Tensor, TokenLayout]:
        """The same with fewer tokens, where some stand for padding. Waits for the device."""
        if self.padding is None:
            return tokens, self
        mask = self.padding.unflatten(1, self.frame).cpu()  # a meant wait
        compact = TokenLayout.of(mask, device=tokens.device)
        return tokens if compact.index is None else tokens[compact.index], compact

    def tokens_at(self, cells: Tensor) -> Tensor:
        """The tokens at ``cells`` [M] (row * w + column), counted within each image: [B, M], -1 where there is none."""
        batch, size = self.batch, self.frame[0] * self.frame[1]
        if self.index is None or self.offsets is None:
            return cells.expand(batch, -1)
        numbers = torch.arange(len(self.index), device=cells.device)
        places = numbers.new_full((batch * size,), -1).index_copy(0, self.index, numbers).view(batch, size)
        return (places[:, cells] - self.offsets.offsets[:-1, None]).clamp(min=-1)
