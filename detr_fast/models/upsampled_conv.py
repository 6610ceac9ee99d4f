"""A 3x3 convolution of a map that is upsampled by two, computed at the map's own size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def upsampled_conv(x: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """``conv2d(interpolate(x, size, mode="nearest"), weight, padding=1)``, exact but for rounding.

    Where the size doubles, a pixel of the result sees 2 x 2 different values, so that four 2 x 2 kernels, one for each
    parity of row and column, do in 16 products what takes 36, and the upsampled map is never made. That holds for 2n
    rows and for the 2n - 1 that a convolution of stride 2 makes n of; any other size takes the plain way.

    Args:
        x: [K, C, h, w].
        weight: [D, C, 3, 3].
        size: (height, width) of the upsampled map.

    Returns:
        [K, D, height, width]. Differentiable in ``x`` and ``weight``.
    """
    traced = any(type(length) is not int for length in (*x.shape, *size))  # for any size
    extra = [2 * small - large for small, large in zip(x.shape[-2:], size, strict=True)]
    if traced or not set(extra) <= {0, 1} or min(x.shape[-2:]) < 2:
        return F.conv2d(F.interpolate(x, size=list(size), mode="nearest"), weight, padding=1)
    pixels = F.pixel_shuffle(F.conv2d(x, _parity_kernels(weight), padding=1), 2)
    # The result's row 0 is of even parity; the shuffled map starts with the odd one before it.
    result = pixels[:, :, 1 : 1 + size[0], 1 : 1 + size[1]]
    # A last row or column without its twin meets the padding one step earlier than the kernels do.
    if extra[0]:
        result[:, :, -1:] = _last_rows(x, weight, size[1])
    if extra[1]:
        result[:, :, :, -1:] = _last_rows(x.mT, weight.mT, size[0]).mT
    return result


def _parity_kernels(weight: Tensor) -> Tensor:
    """[4 D, C, 2, 2], in the order of ``pixel_shuffle``: odd row and column, odd row, odd column, neither."""
    above, centre, below = weight.unbind(2)  # [D, C, 3]
    rows = torch.stack((torch.stack((above + centre, below), 2), torch.stack((above, centre + below), 2)), 1)
    left, middle, right = rows.unbind(4)  # [D, 2, C, 2]
    return torch.stack((torch.stack((left + middle, right), 4), torch.stack((left, middle + right), 4)), 2).flatten(
        0, 2
    )


def _last_rows(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """The last row of the result [K, D, 1, width], where the upsampled map has an odd number of rows."""
    rows = F.interpolate(x[:, :, -2:], size=(2, width), mode="nearest")
    return F.conv2d(rows, weight[:, :, :2], padding=(0, 1))
