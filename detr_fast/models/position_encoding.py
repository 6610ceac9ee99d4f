"""Positional encodings of a feature map, added to queries and keys of every attention layer over it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detr_fast.data.batch import ImageBatch


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of a token's row and column at geometrically spaced wavelengths (Vaswani et al. 2017, in 2-d).

    Rows and columns are counted over valid tokens only, so that padding does not move them.

    Args:
        num_pos_feats: channels per axis; the encoding has twice as many.
        temperature: ratio of the longest to the shortest wavelength.
        normalize: divide by the image's valid height and width and multiply by ``scale``.
        scale: radians of the whole axis, 2 pi where None; needs ``normalize``.
    """

    def __init__(
        self,
        num_pos_feats: int = 64,
        temperature: float = 10000,
        normalize: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if scale is not None and not normalize:
            raise ValueError(f"scale needs normalize=True, got {scale=} and {normalize=}")
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else scale

    def forward(self, features: ImageBatch) -> Tensor:
        """The encoding [B, 2 * num_pos_feats, h, w] (first half rows, second half columns).

        What it is in the padding is not specified. It is computed in float32, or in float64 for such features.
        """
        dtype = torch.promote_types(features.tensors.dtype, torch.float32)
        rows = columns = ~features.mask  # [B, h, w]
        if features.sizes is not None or features.padded is False:
            # A rectangle's rows are counted in its first column: as many fewer sines as there are columns.
            rows, columns = rows[:, :, :1], columns[:, :1, :]
        y = rows.cumsum(1, dtype=dtype)
        x = columns.cumsum(2, dtype=dtype)
        if self.normalize:
            y = y / (y[:, -1:, :] + 1e-6) * self.scale
            x = x / (x[:, :, -1:] + 1e-6) * self.scale
        shape = (*features.mask.shape, self.num_pos_feats)
        return torch.cat((self._waves(y).expand(shape), self._waves(x).expand(shape)), dim=3).permute(0, 3, 1, 2)

    def _waves(self, position: Tensor) -> Tensor:
        channel = torch.arange(self.num_pos_feats, dtype=position.dtype, device=position.device)
        wavelength = self.temperature ** (2 * (channel // 2) / self.num_pos_feats)
        angle = position[..., None] / wavelength  # [B, h, w, num_pos_feats]
        return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4).flatten(3)


class PositionEmbeddingLearned(nn.Module):
    """One learned vector per column and per row, for feature maps of up to 50 x 50 tokens.

    Args:
        num_pos_feats: channels per axis; the encoding has twice as many.
    """

    def __init__(self, num_pos_feats: int = 256) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(50, num_pos_feats)
        self.col_embed = nn.Embedding(50, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, features: ImageBatch) -> Tensor:
        """The encoding [B, 2 * num_pos_feats, h, w] (first half columns, second half rows).

        Raises:
            ValueError: the feature map is larger than 50 x 50.
        """
        batch, _, height, width = features.tensors.shape
        limit = self.row_embed.num_embeddings
        if max(height, width) > limit:
            raise ValueError(f"learned positions end at {limit} x {limit} tokens, got a map of {height} x {width}")
        columns = self.col_embed.weight[:width].expand(height, width, -1)
        rows = self.row_embed.weight[:height, None].expand(height, width, -1)
        return torch.cat((columns, rows), dim=-1).permute(2, 0, 1).expand(batch, -1, -1, -1)
