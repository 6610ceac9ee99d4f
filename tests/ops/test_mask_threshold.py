"""Upsampled masks above a bound: every backend against torch's interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops import Places, _native, mask_threshold
from ops.test_mask_argmax import BACKENDS, SIZES, everywhere


def check(masks: Tensor, frame: tuple[int, int], bound: float, backend: str) -> None:
    above = mask_threshold(masks, *everywhere(tuple(masks.shape[1:]), frame), bound, backend=backend)
    upsampled = F.interpolate(masks[None].double(), frame, mode="bilinear")[0] - bound
    assert above.shape == upsampled.shape and above.dtype == torch.uint8 and above.device == masks.device
    # Where a value is the bound but for rounding it may be either.
    assert torch.equal(above.bool() | (upsampled.abs() < 4e-6), (upsampled > 0) | (upsampled.abs() < 4e-6))
    assert 0 < above.float().mean() < 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "frame"), SIZES)
@pytest.mark.parametrize("bound", [0.0, -0.4])
def test_it_is_the_interpolated_masks_compared(backend: str, size: tuple, frame: tuple, bound: float) -> None:
    masks = torch.randn(11, *size)
    masks[0], masks[1] = 1, -1
    check(masks, frame, bound, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_places_of_a_slice_in_half_precision(backend: str) -> None:
    # Sixteenths, upsampled four times: weights are eighths, nothing is rounded, zeros are zeros in any order.
    masks = (torch.randint(-40, 41, (6, 8, 20)) / 16).bfloat16()[:, :, 3:13]
    rows, columns = everywhere((8, 10), (32, 40))
    whole = mask_threshold(masks, rows, columns, backend=backend)
    assert torch.equal(whole, mask_threshold(masks.float(), rows, columns, backend="reference"))
    some = Places(rows.first[[3, 3, 31]], rows.share[[3, 3, 31]], 8)
    assert torch.equal(mask_threshold(masks, some, columns, backend=backend), whole[:, [3, 3, 31]])
    assert mask_threshold(masks[:0], rows, columns, backend=backend).shape == (0, 32, 40)
    none = Places(rows.first[:0], rows.share[:0], 8)
    assert mask_threshold(masks, none, columns, backend=backend).shape == (6, 0, 40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_and_what_equals_the_bound_is_not_above(backend: str) -> None:
    masks = torch.tensor([[[0.0, 1.0], [float("nan"), float("inf")]]])
    places = Places(np.array([0, 1], np.int32), np.zeros(2, np.float32), 2)
    assert mask_threshold(masks[:, :1], places._replace(first=places.first[:1], share=places.share[:1], size=1), places,
                          backend=backend).tolist() == [[[0, 1]]]  # fmt: skip
    assert mask_threshold(masks, places, places, backend=backend)[0, 1, 0] == 0


def test_bad_input_is_refused() -> None:
    rows, columns = everywhere((3, 4), (6, 8))
    with pytest.raises(ValueError, match=r"masks must be float \[K, h, w\] with pixels, got torch.int64 \[2, 3, 4\]"):
        mask_threshold(torch.zeros(2, 3, 4).long(), rows, columns)
    with pytest.raises(ValueError, match="rows must be places in maps of 4 rows"):
        mask_threshold(torch.zeros(2, 4, 4), rows, columns)
    if _native.load().module is not None:
        with pytest.raises(NotImplementedError, match="the masks are float64"):
            mask_threshold(torch.zeros(2, 3, 4).double(), rows, columns, backend="native")
