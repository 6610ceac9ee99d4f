"""The highest of upsampled masks: native against the reference, the reference against torch's interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detr_fast.ops import Places, _native, mask_argmax

native = pytest.param(
    "native", marks=pytest.mark.skipif(_native.load().module is None, reason=str(_native.load().why_not))
)
BACKENDS = ["reference", native]
SIZES = [
    ((3, 4), (12, 16)),
    ((1, 1), (5, 3)),
    ((7, 5), (7, 5)),
    ((9, 30), (4, 7)),
    ((5, 6), (37, 35)),
    ((1, 8), (1, 40)),
]


def everywhere(size: tuple[int, int], frame: tuple[int, int]) -> tuple[Places, Places]:
    rows, columns = (Places.of(np.arange(f), s, f) for s, f in zip(size, frame, strict=True))
    return rows, columns


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "frame"), SIZES)
def test_it_is_the_argmax_of_the_interpolated_masks(backend: str, size: tuple, frame: tuple) -> None:
    masks = torch.randn(9, *size)
    got = mask_argmax(masks, *everywhere(size, frame), backend=backend)
    upsampled = F.interpolate(masks[None].double(), frame, mode="bilinear")[0]
    assert got.shape == frame and got.dtype == torch.int64
    # Where two masks are equal but for rounding either may win.
    highest, chosen = upsampled.amax(0), upsampled.gather(0, got[None])[0]
    assert (highest - chosen).max() <= 4e-6
    assert (got == upsampled.argmax(0)).float().mean() > 0.99 or got.numel() < 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_rows_and_columns_of_a_slice(backend: str) -> None:
    masks = torch.randn(6, 8, 20)[:, :, 3:13]
    rows, columns = everywhere((8, 10), (40, 50))
    whole = mask_argmax(masks, rows, columns, backend=backend)
    some = Places(rows.first[[3, 3, 39]], rows.share[[3, 3, 39]], 8)
    assert torch.equal(mask_argmax(masks, some, columns, backend=backend), whole[[3, 3, 39]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_ties(backend: str, dtype: torch.dtype) -> None:
    masks = torch.zeros(4, 3, 3, dtype=dtype)
    masks[2:, 1] = 2
    got = mask_argmax(masks, *everywhere((3, 3), (3, 3)), backend=backend)
    assert got.tolist() == [[0] * 3, [2] * 3, [0] * 3]


def test_bad_input_is_refused() -> None:
    rows, columns = everywhere((3, 4), (6, 8))
    with pytest.raises(ValueError, match="masks must be at least one, got none"):
        mask_argmax(torch.zeros(0, 3, 4), rows, columns)
    with pytest.raises(ValueError, match=r"masks must be float \[K, h, w\] with pixels, got torch.float32 \[2, 0, 4\]"):
        mask_argmax(torch.zeros(2, 0, 4), rows, columns)
    with pytest.raises(ValueError, match="rows must be places in maps of 4 rows"):
        mask_argmax(torch.zeros(2, 4, 4), rows, columns)
    with pytest.raises(ValueError, match="columns must be places in maps of 4 columns"):
        mask_argmax(torch.zeros(2, 3, 4), rows, columns._replace(first=columns.first + 2))
    with pytest.raises(NotImplementedError, match="the masks are float64"):
        mask_argmax(torch.zeros(2, 3, 4).double(), rows, columns, backend="native")
