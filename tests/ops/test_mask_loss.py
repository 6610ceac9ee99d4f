"""The losses of masks: every backend against the reference in float64, the reference against the formula by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detr_fast.ops import _native, mask_loss

native = pytest.param(
    "native", marks=pytest.mark.skipif(_native.load().module is None, reason=str(_native.load().why_not))
)
BACKENDS = ["reference", native]

# Size of the logits, and for each image its number of masks and their size.
SHAPES = {
    "one mask": ((4, 5), [(1, 16, 20)]),
    "images of different sizes": ((10, 12), [(2, 40, 47), (3, 33, 20)]),
    "no masks in one image, which is the largest": ((10, 12), [(2, 30, 20), (0, 40, 45), (1, 17, 48)]),
    "one row of logits": ((1, 7), [(2, 9, 27)]),
    "one pixel": ((1, 1), [(2, 1, 1)]),
    "more logits than pixels": ((9, 30), [(3, 4, 7)]),
    "as many logits as pixels": ((13, 17), [(2, 13, 17)]),
    "a frame that is no multiple": ((5, 6), [(2, 37, 35)]),
    "one real size": ((40, 54), [(4, 160, 213)]),
}


def make_case(shape: tuple) -> tuple[Tensor, list[Tensor]]:
    size, images = shape
    masks = []
    for count, height, width in images:
        rows, columns = torch.rand(2, count, 1, 1) * height, torch.rand(2, count, 1, 1) * width
        inside_rows = (torch.arange(height)[None, :, None] - rows[0]).abs() <= rows[1]
        masks.append(inside_rows & ((torch.arange(width)[None, None] - columns[0]).abs() <= columns[1]))
    return 3 * torch.randn(sum(count for count, _, _ in images), *size), masks


def losses_and_gradients(logits: Tensor, masks: list[Tensor], backend: str) -> list[Tensor]:
    x = logits.clone().requires_grad_()
    losses = mask_loss(x, masks, backend=backend)
    weights = torch.linspace(1, 2, len(x), dtype=x.dtype)
    gradients = [torch.autograd.grad((loss * weights).sum(), x, retain_graph=True)[0] for loss in losses]
    return [*(loss.detach() for loss in losses), *gradients]


@pytest.mark.skipif(_native.load().module is None, reason=str(_native.load().why_not))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_native_is_as_exact_as_the_reference(shape: tuple, dtype: torch.dtype) -> None:
    logits, masks = make_case(shape)
    logits = logits.to(dtype)
    exact = losses_and_gradients(logits.double(), masks, "reference")
    reference = losses_and_gradients(logits, masks, "reference")
    ours = losses_and_gradients(logits, masks, "native")
    for name, a, b, c in zip(("mask", "dice", "grad_mask", "grad_dice"), exact, reference, ours, strict=True):
        assert c.dtype == b.dtype and c.shape == b.shape
        ulp = torch.finfo(c.dtype).eps * a.abs().max()
        allowed = 2 * (b - a).abs().max() + 4 * ulp
        assert (c - a).abs().max() <= allowed, name
        assert a.abs().max() > 0
    assert torch.equal(mask_loss(logits, masks, backend="native").mask, ours[0])


def test_the_reference_is_the_formula_pixel_by_pixel() -> None:
    logits, masks = make_case(((3, 4), [(1, 6, 8)]))  # every pixel lies a quarter between two logits
    focal = p_inside = p_sum = 0.0
    for y in range(6):
        for x in range(8):
            row, column = max(y / 2 - 0.25, 0), max(x / 2 - 0.25, 0)
            i, j, a, b = int(row), int(column), row % 1, column % 1
            around = [[logits[0, min(i + k, 2), min(j + m, 3)].item() for m in (0, 1)] for k in (0, 1)]
            top, bottom = ((1 - b) * pair[0] + b * pair[1] for pair in around)
            z, inside = (1 - a) * top + a * bottom, bool(masks[0][0, y, x])
            p = 1 / (1 + math.exp(-z))
            p_t = p if inside else 1 - p
            focal -= (0.25 if inside else 0.75) * (1 - p_t) ** 2 * math.log(p_t)
            p_inside, p_sum = p_inside + p * inside, p_sum + p
    losses = mask_loss(logits, masks, backend="reference")
    area = masks[0].sum().item()
    assert losses.mask.item() == pytest.approx(focal / 48, rel=1e-5)
    assert losses.dice.item() == pytest.approx(1 - (2 * p_inside + 1) / (p_sum + area + 1), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_give_no_nan(backend: str) -> None:
    _, masks = make_case(((4, 4), [(2, 16, 16)]))
    logits = torch.full((2, 4, 4), -1e4)
    logits[1] = 1e4
    mask, dice, grad_mask, grad_dice = losses_and_gradients(logits, masks, backend)
    outside = [(~masks[0][1]).float().mean().item(), masks[0][0].float().mean().item()]
    assert mask[1].item() == pytest.approx(0.75e4 * outside[0], rel=1e-5)
    assert mask[0].item() == pytest.approx(0.25e4 * outside[1], rel=1e-5)
    assert all(bool(x.isfinite().all()) for x in (dice, grad_mask, grad_dice))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_logit_that_is_no_number_shows_in_its_own_mask_alone(backend: str) -> None:
    logits, masks = make_case(SHAPES["images of different sizes"])
    logits[1, 3, 4] = math.nan
    for losses in mask_loss(logits, masks, backend=backend):
        assert losses.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_bytes_and_no_masks(backend: str) -> None:
    logits, masks = make_case(SHAPES["images of different sizes"])
    expected = mask_loss(logits, masks, backend=backend)
    wider = torch.zeros(5, 10, 30)
    wider[:, :, 7:19] = logits
    as_bytes = [torch.stack((x.to(torch.uint8), x.to(torch.uint8)), -1)[..., 0] for x in masks]
    got = mask_loss(wider[:, :, 7:19], as_bytes, backend=backend)
    assert torch.equal(got.mask, expected.mask) and torch.equal(got.dice, expected.dice)
    none = torch.zeros(0, 10, 12, requires_grad=True)
    losses = mask_loss(none, [torch.zeros(0, 5, 5, dtype=torch.bool)], backend=backend)
    assert losses.mask.shape == losses.dice.shape == (0,)
    (losses.mask.sum() + losses.dice.sum()).backward()
    assert none.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_node_for_the_compiler(backend: str) -> None:
    logits, masks = make_case(SHAPES["one mask"])
    torch.library.opcheck(torch.ops.detr_fast.mask_loss.default, (logits.requires_grad_(), masks, True, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_losses_are_the_same(backend: str) -> None:
    logits, masks = make_case(SHAPES["images of different sizes"])
    compiled = torch.compile(lambda x: mask_loss(x, masks, backend=backend), backend="aot_eager", fullgraph=True)
    results = []
    for losses_of in (compiled, lambda x: mask_loss(x, masks, backend=backend)):
        x = logits.clone().requires_grad_()
        losses = losses_of(x)
        (losses.mask.sum() + 2 * losses.dice.sum()).backward()
        results.append((*losses, x.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_bad_input_is_refused() -> None:
    logits, masks = make_case(SHAPES["images of different sizes"])
    with pytest.raises(ValueError, match=r"logits must be float \[N, h, w\], got torch.int64 \[5, 10, 12\]"):
        mask_loss(logits.long(), masks)
    with pytest.raises(ValueError, match="logits must be of the 5 masks of all images, got 4"):
        mask_loss(logits[:4], masks)
    with pytest.raises(ValueError, match=r"masks of image 1 must be bool .* got torch.float32 \[3, 33, 20\]"):
        mask_loss(logits, [masks[0], masks[1].float()])
    with pytest.raises(ValueError, match=r"masks of image 0 must be bool .* got torch.bool \[2, 40\]"):
        mask_loss(logits, [masks[0][:, :, 0], masks[1]])
    with pytest.raises(ValueError, match="one tensor an image, got none"):
        mask_loss(logits, [])
    with pytest.raises(ValueError, match="must have pixels"):
        mask_loss(logits[:, :0], masks)
    with pytest.raises(ValueError, match="masks of image 0 must be on cpu"):
        mask_loss(logits, [x.to("meta") for x in masks])
    with pytest.raises(NotImplementedError, match="the logits are float64"):
        mask_loss(logits.double(), masks, backend="native")
