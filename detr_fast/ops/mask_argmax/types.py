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

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``first`` and ``share`` on a device, which is not waited for."""
        # Memory that is not pinned is read before the call returns, blocking or not.
        first, share = torch.from_numpy(self.first), torch.from_numpy(self.share)
        return first.to(device, non_blocking=True), share.to(device, non_blocking=True)

    def interpolate(self, maps: Tensor, dim: int) -> Tensor:
        """Maps with ``size`` rows or columns in the dimension 1 or 2, at the places."""
        first, share = self.on(maps.device)
        share = share.to(maps.dtype)
        if dim == 1:
            share = share[:, None]
        return torch.lerp(
            maps.index_select(dim, first), maps.index_select(dim, (first + 1).clamp(max=self.size - 1)), share
        )


def check_places(masks: Tensor, rows: Places, columns: Places) -> None:
    """Raise a ValueError where masks are not float [K, h, w] with pixels, or the places not of maps of that size."""
    if masks.ndim != 3 or not masks.is_floating_point() or 0 in masks.shape[1:]:
        raise ValueError(f"masks must be float [K, h, w] with pixels, got {masks.dtype} {list(masks.shape)}")
    for name, places, size in (("rows", rows, masks.shape[1]), ("columns", columns, masks.shape[2])):
        first = places.first
        inside = len(first) == 0 or (int(first.min()) >= 0 and int(first.max()) < size)
        if places.size != size or len(places.share) != len(first) or not inside:
            raise ValueError(f"{name} must be places in maps of {size} {name}, got {places}")
