"""Optimised copies in 8-bit integers: near the model's answers, in every form of it, and as dependable as others."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from small import small_detr
from test_golden import golden_images, golden_model
from test_optimize import NAMES, resident_bytes, resnet_detr
from torch import Tensor, nn

from detr_fast import ImageBatch, optimize
from detr_fast.models.backbone import BasicBlock, ResNet
from detr_fast.models.packed_resnet_int8 import PackedResNetInt8
from detr_fast.models.segmentation import DetrSegm
from detr_fast.predictor import Predictor


def in_int8(model: nn.Module, calibration: Any) -> nn.Module:
    return optimize(model, dtype=torch.int8, calibration=calibration)


def small_body() -> nn.Module:
    """A narrow ResNet whose stages have more than one block."""
    return in_int8(nn.Sequential(ResNet(BasicBlock, (2, 1, 1, 1), width=8)), torch.randn(2, 3, 96, 64))


@pytest.mark.parametrize("variant", ["r50_dc5", "r101"])
def test_answers_are_near_the_originals(variant: str) -> None:
    """Measured on these weights: boxes off by up to 0.0032 (r101), logits by 0.036 of 2.7."""
    model = golden_model(variant).eval()
    fast = in_int8(model, [golden_images()])
    with torch.inference_mode():
        expected, found, again = model(golden_images()), fast(golden_images()), fast(golden_images())
    assert isinstance(fast.backbone[0].body, PackedResNetInt8)
    for name, bound in zip(NAMES, (0.1, 0.01), strict=True):
        assert found[name].dtype == torch.float32
        assert 1e-5 < (found[name] - expected[name]).abs().max() < bound
        assert torch.equal(again[name], found[name])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_all_maps_are_near(name: str) -> None:
    model, images = resnet_detr(name, all_maps=True).eval(), torch.randn(2, 3, 96, 128)
    body, fast = model.backbone[0].body, in_int8(model, images).backbone[0].body
    with torch.inference_mode():
        for found, expected in zip(fast(images), body(images), strict=True):
            assert found.shape == expected.shape and found.dtype == torch.float32
            error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            assert 0 < error < 0.05  # a step is 1/255 of a map's highest number


def test_masks_are_near() -> None:
    segm, images = DetrSegm(resnet_detr(all_maps=True)).eval(), torch.randn(1, 3, 64, 96)
    expected, found = segm(images)["pred_masks"], in_int8(segm, images)(images)["pred_masks"]
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_map_beyond_what_calibration_saw_is_cut_off() -> None:
    net, images = nn.Sequential(ResNet(BasicBlock, (1, 1, 1, 1), width=8)), torch.randn(1, 3, 64, 64)
    fast = in_int8(net, 0.1 * images)
    with torch.inference_mode():
        assert fast(images)[-1].max() < 0.5 * net(images)[-1].max()


@pytest.mark.parametrize(
    "form",
    [
        lambda images: images,
        lambda images: [images[:1], images[1:]],
        lambda images: list(images),  # [3, H, W] each
        lambda images: (batch for batch in [images]),
        lambda images: ImageBatch.of(list(images)),
    ],
    ids=["batch", "batches", "images", "generator", "ImageBatch"],
)
def test_forms_of_calibration_images(form: Callable[[Tensor], Any]) -> None:
    model, images = resnet_detr().eval(), torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        found, expected = (in_int8(model, given)(images)["pred_boxes"] for given in (form(images), images))
    assert torch.equal(found, expected)


def test_the_model_itself_stays_as_it_was() -> None:
    model = resnet_detr()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = in_int8(model, torch.randn(1, 3, 64, 64))
    assert model.training and not fast.training and isinstance(model.backbone[0].body, ResNet)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(key.startswith("backbone.0.body") for key in fast.state_dict())


def test_pickles_copies_and_threads_agree() -> None:
    fast = small_body()
    images = [torch.randn(1, 3, height, width) for height, width in ((1, 1), (33, 70), (96, 64), (20, 130)) * 4]
    with torch.inference_mode():
        expected = [fast(image) for image in images]
    for other in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast), fast):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda image, model=other: model(image), images))
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_memory_is_flat_over_calls_of_any_size() -> None:
    body, draw = small_body(), random.Random(0)
    sizes = [(draw.randint(1, 320), draw.randint(1, 320)) for _ in range(500)]
    with torch.inference_mode():
        for height, width in [(320, 320), *sizes[:100]]:
            body(torch.zeros(1, 3, height, width))
        before = resident_bytes()
        for height, width in sizes:
            body(torch.zeros(1, 3, height, width))
    assert resident_bytes() - before < 4 << 20


def test_the_copy_can_be_exported() -> None:
    fast, images = in_int8(resnet_detr(), torch.randn(1, 3, 64, 64)), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        program = torch.export.export(fast, (images,))
        # Bytes near the middle between two may be rounded either way.
        torch.testing.assert_close(
            program.module()(images)["pred_boxes"], fast(images)["pred_boxes"], atol=2e-2, rtol=0
        )


def test_predictor_calibrates_on_pictures() -> None:
    model, picture = resnet_detr(), np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    options = {"dtype": torch.int8, "calibration": [picture, picture[:, ::-1]]}
    fast, plain = (Predictor(model, threshold=0, size=64, optimized=choice) for choice in (options, False))
    assert isinstance(fast.model.backbone[0].body, PackedResNetInt8)
    (found,), (expected,) = fast(picture), plain(picture)
    assert 0 < (found.scores - expected.scores).abs().max() < 0.05


def test_a_copy_of_a_copy_is_the_same() -> None:
    fast, images = small_body(), torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(optimize(fast)(images), fast(images), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (resnet_detr, {"dtype": torch.int8}, "calibration must be images like those to come where dtype is torch.int8"),
        (
            resnet_detr,
            {"calibration": torch.zeros(1, 3, 32, 32)},
            "calibration must be None unless dtype is torch.int8",
        ),
        (resnet_detr, {"dtype": torch.int8, "calibration": []}, "calibration must be at least one image, got none"),
        (
            resnet_detr,
            {"dtype": torch.int8, "calibration": torch.full((1, 3, 32, 32), float("inf"))},
            "calibration images must give finite maps",
        ),
        (
            small_detr,
            {"dtype": torch.int8, "calibration": torch.zeros(1, 3, 32, 32)},
            "needs a ResNet with batch norms",
        ),
        (
            lambda: resnet_detr().double(),
            {"dtype": torch.int8, "calibration": torch.zeros(1, 3, 32, 32)},
            "needs a float32 model on a CPU",
        ),
        (resnet_detr, {"dtype": torch.float16}, "dtype must be None, torch.bfloat16 or torch.int8, got torch.float16"),
    ],
)
def test_bad_settings(model: Callable[[], nn.Module], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimize(model(), **settings)
