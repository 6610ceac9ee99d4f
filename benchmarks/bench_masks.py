"""The mask head in inference and in a training step, its losses alone, and post-processing, against the original way.

A training step is the mask head, both losses of ten matched masks, and the gradients of the mask head and of the
features; the detector below it is not part of it. Panoptic post-processing starts from the model's output and ends with
a PNG, that of detections with a mask for each query, both at the size of the photograph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import original_masks, where
from benchmarks.harness import Contest, Contestant
from benchmarks.shapes import MASKS, MaskShape
from detr_fast import PostProcessPanoptic, PostProcessSegm
from detr_fast.mask_losses import mask_losses
from detr_fast.models.segmentation import MaskHead, QueryMasks
from detr_fast.ops import mask_loss

Race = Callable[[str, str, Callable[[], Contest]], None]
CONTESTANTS = ("original", "detr_fast")
CHUNK = 16  # DetrSegm's
THINGS = {number: number <= 90 for number in range(201)}


@pytest.mark.large
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_inference(race: Race, contestant: str) -> None:
    race(f"mask head inference {MASKS.name}", contestant, lambda: inference(MASKS))


@pytest.mark.large
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_training(race: Race, contestant: str) -> None:
    race(f"mask head training {MASKS.name}", contestant, lambda: training(MASKS))


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_losses(race: Race, contestant: str) -> None:
    race(f"mask losses {MASKS.name}", contestant, lambda: losses(MASKS))


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_postprocess(race: Race, contestant: str) -> None:
    pytest.importorskip("PIL", reason="Pillow, which writes the PNG, is not installed")
    race(f"panoptic post-processing {MASKS.name}", contestant, lambda: postprocess(MASKS))


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_detections(race: Race, contestant: str) -> None:
    race(f"masks of detections {MASKS.name}", contestant, lambda: detections(MASKS))


def inputs(shape: MaskShape) -> tuple[MaskHead, Tensor, Tensor, list[Tensor]]:
    """The head, and features, attention and pyramid of one image."""
    torch.manual_seed(0)
    head = MaskHead(256 + 8, [1024, 512, 256], 256)
    projected = torch.randn(1, 256, *shape.map_size(32))
    attention = torch.rand(1, shape.num_queries, 8, *shape.map_size(32))
    pyramid = [torch.randn(1, 64 * stride, *shape.map_size(stride)) for stride in (16, 8, 4)]
    device = where.device()
    return head.to(device), projected.to(device), attention.to(device), [x.to(device) for x in pyramid]


def inference(shape: MaskShape) -> Contest:
    """The logits of all queries."""
    head, projected, attention, pyramid = inputs(shape)

    def original() -> Tensor:
        with torch.inference_mode():
            return original_masks.mask_head(head, projected, attention, pyramid)

    def ours() -> Tensor:
        with torch.inference_mode():
            return QueryMasks(head, attention, head.image_maps(projected, pyramid), CHUNK).dense()

    expected = original()
    contestants = [Contestant("original", original), Contestant("detr_fast", ours)]
    return Contest(
        contestants,
        lambda masks: torch.testing.assert_close(masks, expected, rtol=0, atol=1e-5),
        str(where.device()),
    )


def training(shape: MaskShape) -> Contest:
    """The gradients of the features and of the head's parameters."""
    head, projected, attention, pyramid = inputs(shape)
    wanted = [x.requires_grad_() for x in (projected, attention, *pyramid)] + list(head.parameters())
    queries = torch.randperm(shape.num_queries)[: shape.num_targets].sort().values.to(where.device())
    targets = rectangles(shape).to(where.device())
    target = {"masks": targets, "labels": torch.zeros(len(targets), dtype=torch.int64, device=where.device())}
    indices = [(queries, torch.arange(len(targets), device=where.device()))]

    def original() -> list[Tensor]:
        masks = original_masks.mask_head(head, projected, attention, pyramid)
        loss = original_masks.mask_losses(masks[0, queries], targets, len(targets))
        return list(torch.autograd.grad(loss, wanted))

    def ours() -> list[Tensor]:
        masks = QueryMasks(head, attention, head.image_maps(projected, pyramid), CHUNK)
        losses = mask_losses(masks, [target], indices, len(targets))
        return list(torch.autograd.grad(losses["loss_mask"] + losses["loss_dice"], wanted))

    def check(gradients: list[Tensor]) -> None:
        for gradient, known in zip(gradients, expected, strict=True):
            found = gradient[:, queries] if gradient.shape == attention.shape else gradient
            error = (found - known).norm() / known.norm()
            # float32's: a ReLU of a value near 0 may let a gradient through or not.
            assert error < 5e-3, error

    expected = exact_gradients(head, projected, attention[:, queries], pyramid, targets)
    return Contest([Contestant("original", original), Contestant("detr_fast", ours)], check, str(where.device()))


def exact_gradients(
    head: MaskHead, projected: Tensor, attention: Tensor, pyramid: list[Tensor], targets: Tensor
) -> list[Tensor]:
    """In float64, of the matched queries alone: no other one has a gradient."""
    exact = copy.deepcopy(head).double()
    inputs = [x.detach().double().requires_grad_() for x in (projected, attention, *pyramid)]
    masks = original_masks.mask_head(exact, inputs[0], inputs[1], inputs[2:])
    loss = original_masks.mask_losses(masks[0], targets, len(targets))
    return list(torch.autograd.grad(loss, [*inputs, *exact.parameters()]))


def rectangles(shape: MaskShape) -> Tensor:
    """[T, height, width] masks of a third of the sides."""
    height, width = shape.image_size
    masks = torch.zeros(shape.num_targets, height, width, dtype=torch.bool)
    for number, mask in enumerate(masks):
        top, left = height * number // (2 * shape.num_targets), width * number // (2 * shape.num_targets)
        mask[top : top + height // 3, left : left + width // 3] = True
    return masks


def losses(shape: MaskShape) -> Contest:
    """Both losses of the matched masks and the gradient of their logits, without the mask head."""
    torch.manual_seed(0)
    targets = rectangles(shape).to(where.device())
    logits = torch.randn(shape.num_targets, *shape.map_size(4), device=where.device()).requires_grad_()

    def original(x: Tensor = logits) -> tuple[Tensor, Tensor]:
        loss = original_masks.mask_losses(x, targets, len(targets))
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    def ours() -> tuple[Tensor, Tensor]:
        found = mask_loss(logits, [targets])
        loss = (found.mask.sum() + found.dice.sum()) / len(targets)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    exact_loss, exact_gradient = original(logits.detach().double().requires_grad_())

    def check(found: tuple[Tensor, Tensor]) -> None:
        torch.testing.assert_close(found[0].double(), exact_loss, rtol=1e-5, atol=0)
        error = (found[1] - exact_gradient).norm() / exact_gradient.norm()
        assert error < 1e-5, error

    return Contest([Contestant("original", original), Contestant("detr_fast", ours)], check, str(where.device()))


def postprocess(shape: MaskShape) -> Contest:
    """The segments of an image whose every third query is confident, at the size of the photograph."""
    torch.manual_seed(0)
    logits = torch.zeros(1, shape.num_queries, 251)
    logits[0, range(shape.num_queries), torch.randint(1, 201, (shape.num_queries,))] = 12
    logits[0, torch.arange(shape.num_queries) % 3 > 0, 250] = 24
    blobs = F.interpolate(torch.randn(1, shape.num_queries, 8, 8), shape.map_size(4), mode="bicubic")
    outputs = {"pred_logits": logits.to(where.device()), "pred_masks": 6 * blobs.to(where.device())}
    module = PostProcessPanoptic(THINGS)
    size, photograph = shape.image_size, shape.photograph_size

    def original() -> list[tuple[int, int]]:
        return original_masks.panoptic(outputs["pred_logits"][0], outputs["pred_masks"][0], THINGS, size, photograph)[1]

    def ours() -> list[tuple[int, int]]:
        (found,) = module(outputs, [size], [photograph])
        return [(info["category_id"], info["area"]) for info in found["segments_info"]]

    expected = original()

    def check(segments: list[tuple[int, int]]) -> None:
        # A pixel where two masks are equal but for rounding may go either way.
        assert [c for c, _ in segments] == [c for c, _ in expected] and len(segments) > 15, segments
        assert all(abs(a - b) <= 3 for (_, a), (_, b) in zip(segments, expected, strict=True)), (segments, expected)

    return Contest([Contestant("original", original), Contestant("detr_fast", ours)], check, str(where.device()))


def detections(shape: MaskShape) -> Contest:
    """A binary mask of every query at the size of the photograph."""
    torch.manual_seed(0)
    noise = torch.randn(1, shape.num_queries, 8, 8)
    blobs = 6 * F.interpolate(noise, shape.map_size(4), mode="bicubic").to(where.device())
    module = PostProcessSegm()
    size, photograph = shape.image_size, shape.photograph_size

    def original() -> Tensor:
        return original_masks.masks_of_detections(blobs[0], size, photograph)

    def ours() -> Tensor:
        return module([{}], {"pred_masks": blobs}, [photograph], [size])[0]["masks"]

    expected = original()

    def check(masks: Tensor) -> None:
        # A pixel whose probability is one half but for rounding may go either way.
        assert masks.shape == expected.shape and 0.2 < expected.float().mean() < 0.8
        assert (masks != expected).sum() <= 5

    return Contest([Contestant("original", original), Contestant("detr_fast", ours)], check, str(where.device()))
