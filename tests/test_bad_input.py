"""Bad targets and images stop training with a message that names them; odd ones that are no mistake pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import random_outputs, random_targets, small_criterion, small_detr
from torch import Tensor

from detr_fast import HungarianMatcher, ImageBatch, PostProcess
from detr_fast.targets import check_targets

Target = dict[str, Tensor]
NUM_CLASSES = 5


def boxes(*rows: tuple[float, ...]) -> Callable[[Target], Target]:
    return lambda target: {"labels": target["labels"][: len(rows)], "boxes": torch.tensor(rows)}


def labels(*values: Any, dtype: torch.dtype = torch.int64) -> Callable[[Target], Target]:
    return lambda target: target | {"labels": torch.tensor(values, dtype=dtype)}


FINE = (0.5, 0.5, 0.2, 0.2)

# What becomes of the second of two good targets, and what the message must then say of it.
BAD_TARGETS: dict[str, tuple[Callable[[Target], Target], str]] = {
    "boxes in pixels": (boxes(FINE, (320.0, 240.0, 64.0, 48.0)), "target 1, object 1 is not a fraction.*in pixels"),
    "boxes as xyxy": (boxes(FINE, (0.6, 0.7, 0.9, 0.95)), "target 1, object 1 reaches outside.*xyxy"),
    "negative width": (boxes((0.5, 0.5, -0.1, 0.2), FINE), "target 1, object 0 has a negative width or height"),
    "negative height": (boxes((0.5, 0.5, 0.1, -0.2), FINE), "target 1, object 0 has a negative width or height"),
    "NaN": (boxes(FINE, (0.5, float("nan"), 0.1, 0.2)), "target 1, object 1 is not finite"),
    "infinite": (boxes((0.5, 0.5, float("inf"), 0.2), FINE), "target 1, object 0 is not finite"),
    "label below 0": (labels(0, -1), "label -1 of target 1, object 1 is outside 0 to 4"),
    "label out of range": (labels(0, 80), "label 80 of target 1, object 1 is outside 0 to 4"),
    "no-object as a label": (labels(NUM_CLASSES, 0), "label 5 of target 1, object 0 means 'no object'.*num_classes=5"),
    "float labels": (labels(0, 1, dtype=torch.float32), "labels of target 1 must be int64.*float32"),
    "another number of labels": (labels(0), r"boxes of target 1 must be float \[1, 4\], got torch.float32 \[2, 4\]"),
    "no labels": (lambda target: {"boxes": target["boxes"]}, "target 1 has no 'labels', only"),
    "no boxes": (lambda target: {"labels": target["labels"]}, "target 1 has no 'boxes', only"),
    "integer boxes": (
        lambda target: target | {"boxes": torch.ones(2, 4, dtype=torch.int64)},
        "boxes of target 1 .*int64",
    ),
    "three numbers a box": (
        lambda target: target | {"boxes": torch.rand(2, 3)},
        r"boxes of target 1 must be .*\[2, 3\]",
    ),
}


@pytest.mark.parametrize("train", [HungarianMatcher, small_criterion], ids=["matcher", "criterion"])
@pytest.mark.parametrize("name", BAD_TARGETS)
def test_bad_targets_are_named(name, train):
    spoil, message = BAD_TARGETS[name]
    good, spoilt = random_targets([2, 2])
    outputs = random_outputs(2)
    train()(outputs, [good, good])
    with pytest.raises(ValueError, match=message):
        train()(outputs, [good, spoil(spoilt)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
def test_nothing_warns_before_the_error(value: float) -> None:
    (target,) = random_targets([2])
    target["boxes"][1] = value
    with pytest.raises(ValueError, match="target 0, object 1"):
        check_targets([target], NUM_CLASSES)


@pytest.mark.parametrize("train", [HungarianMatcher, small_criterion], ids=["matcher", "criterion"])
def test_targets_must_be_one_dict_an_image(train):
    with pytest.raises(ValueError, match="one dict an image: got 3 for 2 images"):
        train()(random_outputs(2), random_targets([1, 1, 1]))
    with pytest.raises(ValueError, match="one dict an image: got 0 for 2 images"):
        train()(random_outputs(2), [])


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        (
            "pred_boxes",
            (1, 3, 2),
            "the L1 distance of image 1, query 3, target 0 at decoder layer 0 is not a number: nan",
        ),
        ("pred_logits", (0, 6, 1), "the class probability of image 0, query 6, target 0 at decoder layer 0"),
    ],
)
def test_a_diverged_model_is_named_by_the_strict_matcher(name, place, message):
    outputs, targets = random_outputs(2), random_targets([2, 2])
    HungarianMatcher(1, 5, 2, strict=True)(outputs, targets)
    outputs[name][place] = float("nan")
    with pytest.raises(ValueError, match=message):
        HungarianMatcher(1, 5, 2, strict=True)(outputs, targets)
    pairs = HungarianMatcher(1, 5, 2)(outputs, targets)
    assert place[1] not in pairs[place[0]][0]  # there are others to match


def test_what_is_odd_but_no_mistake_passes():
    border = torch.tensor([[0.95, 0.5, 0.1002, 0.2], [0.5, 0.5, 1.0, 1.0]])  # rounding of a resize; the whole image
    point = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])  # no area, twice
    nothing = {"labels": torch.empty(0, dtype=torch.int64), "boxes": torch.empty(0, 4)}
    for values in (border, point):
        targets = [{"labels": torch.tensor([0, NUM_CLASSES - 1]), "boxes": values}, nothing]
        losses = small_criterion()(random_outputs(2), targets)
        assert all(loss.isfinite() for loss in losses.values())


def test_on_a_device_only_metadata_is_looked_at():
    """Looking at values would wait for the device; the meta device has none, so any look at them raises."""
    target = {"labels": torch.zeros(2, dtype=torch.int64, device="meta"), "boxes": torch.zeros(2, 4, device="meta")}
    with pytest.raises(ValueError, match=r"boxes of target 0 must be float \[2, 4\]"):
        check_targets([target | {"boxes": torch.zeros(3, 4, device="meta")}], NUM_CLASSES)
    check_targets([target], NUM_CLASSES)


BAD_IMAGES = {
    "no images": ([], ValueError, "samples must hold at least one image, got an empty list"),
    "an empty tensor": (torch.zeros(0, 3, 32, 32), ValueError, r"at least one image.*\[0, 3, 32, 32\]"),
    "an image of no pixels": (
        [torch.zeros(3, 0, 32)],
        ValueError,
        r"image 0 must be \[3, height, width\], got \[3, 0, 32\]",
    ),
    "one image without a list": (
        torch.zeros(3, 32, 32),
        ValueError,
        r"\[B, channels, height, width\], got \[3, 32, 32\]",
    ),
    "a path": ("picture.jpg", TypeError, "samples must be a list of images"),
    "images of other channels": ([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], ValueError, "image 1 must be"),
    "no tensors": ([b"jpeg"], TypeError, "image 0 must be a tensor"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_named(name):
    samples, error, message = BAD_IMAGES[name]
    with pytest.raises(error, match=message):
        small_detr()(samples)


def test_postprocess_needs_a_size_an_image():
    with pytest.raises(ValueError, match=re.escape("target_sizes must be [2, 2] (h, w), got [1, 2]")):
        PostProcess()(random_outputs(2), torch.tensor([[480, 640]]))


def test_an_image_of_one_pixel_is_an_image():
    samples = ImageBatch.of([torch.rand(3, 1, 1), torch.rand(3, 32, 48)])
    outputs = small_detr().eval()(samples)
    assert outputs["pred_boxes"].isfinite().all()
