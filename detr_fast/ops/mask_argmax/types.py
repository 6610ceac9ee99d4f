"""Where pixels of an upsampled map lie in the map itself."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Places(NamedTuple):
    """Rows or columns of an upsampled map, each between two of the map's own; on the host.

    Attributes:
        first: [count] int32, the one before, or at the place.
        share: [count] float32 in [0, 1), of the one after it; 0 where there is none.
        size: how many rows or columns the map has.
    """

    first: np.ndarray
    share: np.ndarray
    size: int

    @staticmethod
    def of(places: np.ndarray, size: int, upsampled: int) -> Places:
        """The given places of ``upsampled`` ones, of bilinear interpolation from ``size``, corners not aligned."""
        source = np.maximum((places + 0.5) * (size / upsampled) - 0.5, 0)
        first = np.minimum(source.astype(np.int32), size - 1)
        share = np.where(first == size - 1, 0, source - first)
        return Places(first, share.astype(np.float32), size)

    def interpolate(self, maps: Tensor, dim: int) -> Tensor:
        """Maps with ``size`` rows or columns in the dimension 1 or 2, at the places."""
        first = torch.from_numpy(self.first).to(maps.device)
        share = torch.from_numpy(self.share).to(maps)
        if dim == 1:
            share = share[:, None]
        return torch.lerp(
            maps.index_select(dim, first), maps.index_select(dim, (first + 1).clamp(max=self.size - 1)), share
        )
