"""What is asked of Triton's mask_loss, mask_argmax and mask_threshold, on a GPU or under Triton's interpreter.

Run in a process of its own by ``test_masks_triton.py``. Not collected by name.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detr_fast.ops import mask_argmax, mask_loss, mask_threshold
from detr_fast.ops.mask_loss import triton_impl
from ops.test_mask_argmax import everywhere
from ops.test_mask_loss import losses_and_gradients, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "several tiles": ((5, 9), [(1, 9, 11)]),
    "images of different sizes": ((4, 5), [(1, 7, 8), (2, 6, 5)]),
    "no masks in one image, which is the largest": ((2, 3), [(1, 4, 3), (0, 5, 6), (1, 2, 5)]),
    "one row of logits": ((1, 7), [(2, 2, 9)]),
    "one pixel": ((1, 1), [(2, 1, 1)]),
    "two logits far apart": ((2, 1), [(1, 7, 3)]),
    "more logits than pixels": ((5, 9), [(2, 4, 3)]),
    "as many logits as pixels": ((4, 6), [(2, 4, 6)]),
}
MAPS = [((3, 4), (12, 16)), ((1, 1), (5, 3)), ((9, 30), (4, 7)), ((5, 6), (19, 70))]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small maps, which the interpreter is quick with, have several."""
    monkeypatch.setattr(triton_impl, "BLOCK_ROWS", 4)
    monkeypatch.setattr(triton_impl, "BLOCK_COLUMNS", 8)
    monkeypatch.setattr(triton_impl, "BLOCK_FINISH", 32)
    monkeypatch.setattr(triton_impl, "BLOCK_TILES", 2)


def on_device(shape: tuple) -> tuple[Tensor, list[Tensor]]:
    logits, masks = make_case(shape)
    return logits.to(DEVICE), [x.to(DEVICE) for x in masks]


def check(logits: Tensor, masks: list[Tensor]) -> None:
    exact = losses_and_gradients(logits.double(), masks, "reference")
    reference = losses_and_gradients(logits, masks, "reference")
    ours = losses_and_gradients(logits, masks, "triton")
    for name, a, b, c in zip(("mask", "dice", "grad_mask", "grad_dice"), exact, reference, ours, strict=True):
        assert c.dtype == b.dtype and c.shape == b.shape
        ulp = torch.finfo(c.dtype).eps * a.abs().max()
        # In float64 the reference has no error to compare with: sums in another order have.
        ulps = 32 if logits.dtype == torch.float64 else 4
        assert (c - a).abs().max() <= 2 * (b - a).abs().max() + ulps * ulp, name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_losses_and_gradients_are_as_exact_as_the_reference(shape: tuple) -> None:
    check(*on_device(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_slices_and_bytes(dtype: torch.dtype) -> None:
    logits, masks = on_device(SHAPES["as many logits as pixels"])
    wider = torch.zeros(2, 4, 20, device=DEVICE)
    wider[:, :, 7:13] = logits
    check(wider.to(dtype)[:, :, 7:13], [torch.stack((x, x), -1)[..., 0].to(torch.uint8) for x in masks])


def test_the_losses_are_the_same_without_gradients() -> None:
    logits, masks = on_device(SHAPES["as many logits as pixels"])
    ours = mask_loss(logits, masks, backend="triton")
    torch.testing.assert_close(tuple(ours), tuple(mask_loss(logits, masks, backend="reference")))
    assert not ours.mask.requires_grad


def test_large_logits_and_those_that_are_no_number() -> None:
    logits, masks = on_device(SHAPES["images of different sizes"])
    logits[0], logits[1, 2, 2] = 1e4, math.nan
    mask, dice, grad_mask, grad_dice = losses_and_gradients(logits, masks, "triton")
    assert mask.isnan().tolist() == dice.isnan().tolist() == [False, True, False]
    assert grad_mask[[0, 2]].isfinite().all() and grad_dice[[0, 2]].isfinite().all()
    assert mask[0].item() == pytest.approx(0.75e4 * (56 - masks[0].sum().item()) / 56, rel=1e-5)


def test_no_masks() -> None:
    none = torch.zeros(0, 4, 5, device=DEVICE, requires_grad=True)
    losses = mask_loss(none, [torch.zeros(0, 5, 5, dtype=torch.bool, device=DEVICE)], backend="triton")
    (losses.mask.sum() + losses.dice.sum()).backward()
    assert losses.mask.shape == (0,) and none.grad is not None


def test_one_node_for_the_compiler() -> None:
    logits, masks = on_device(SHAPES["one pixel"])
    arguments = (logits, masks, True, "triton")
    torch.library.opcheck(
        torch.ops.detr_fast.mask_loss.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(("size", "frame"), MAPS)
def test_the_highest_and_what_is_above_a_bound(size: tuple, frame: tuple) -> None:
    masks, places = torch.randn(5, *size, dtype=torch.float64, device=DEVICE), everywhere(size, frame)
    assert torch.equal(mask_argmax(masks, *places, backend="triton"), mask_argmax(masks, *places, backend="reference"))
    for bound in (0.0, 0.25):
        ours = mask_threshold(masks, *places, bound, backend="triton")
        assert torch.equal(ours, mask_threshold(masks, *places, bound, backend="reference"))


def test_half_precision_and_ties() -> None:
    masks = torch.zeros(4, 3, 3, dtype=torch.bfloat16, device=DEVICE)
    masks[2:, 1] = 2
    places = everywhere((3, 3), (3, 3))
    assert mask_argmax(masks, *places, backend="triton").tolist() == [[0] * 3, [2] * 3, [0] * 3]
    assert mask_threshold(masks[2:3], *places, backend="triton").tolist() == [[[0] * 3, [1] * 3, [0] * 3]]
    assert mask_threshold(masks[:0], *places, backend="triton").shape == (0, 3, 3)
