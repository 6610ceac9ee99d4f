"""Prediction in Python: what a ``Predictor`` takes and gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import Fixed, noise, one_box, small_detr, tiny_args

import detr_fast
from detr_fast.build import model_from_args
from detr_fast.checkpoint import CheckpointError, save_checkpoint
from detr_fast.data.images import ImageError
from detr_fast.predictor import Prediction, Predictor


def assert_same(left: Prediction, right: Prediction) -> None:
    assert left.labels.tolist() == right.labels.tolist() and left.size == right.size
    torch.testing.assert_close(left.scores, right.scores, atol=0, rtol=0)
    torch.testing.assert_close(left.boxes_xyxy_px, right.boxes_xyxy_px, atol=0, rtol=0)


def test_thresholds_sorts_names_and_scales() -> None:
    scores = [[0.1, 0.75, 0.0], [0.3, 0.3, 0.0], [0.9, 0.05, 0.0], [0.0, 0.0, 0.71]]
    boxes = [[0.5, 0.5, 0.2, 0.4], [0.1] * 4, [0.25, 0.5, 0.5, 1.0], [0.9, 0.9, 0.4, 0.4]]
    predictor = Predictor(Fixed(scores, boxes), {0: "cat", 1: "dog"})
    (found,) = predictor(noise(200, 100))
    assert found.names == ["cat", "dog", "class 2"] and len(found) == 3
    assert found.labels.tolist() == [0, 1, 2] and found.queries.tolist() == [2, 0, 3]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.75, 0.71]))
    expected = [[0.0, 0, 100, 100], [80, 30, 120, 70], [140, 70, 220, 110]]
    torch.testing.assert_close(found.boxes_xyxy_px, torch.tensor(expected))
    assert found.size == (100, 200)


def test_runs_the_heads_of_the_last_layer_alone() -> None:
    model, layers = small_detr(3), []
    model.aux_loss = True
    model.class_embed.register_forward_pre_hook(lambda _, args: layers.append(len(args[0])))
    Predictor(model, size=32)(noise(32, 32))
    assert layers == [1]


def test_nothing_found() -> None:
    (found,) = Predictor(Fixed([[0.2, 0.2]], [[0.5] * 4]))(noise(20, 10))
    assert len(found) == 0 and found.boxes_xyxy_px.shape == (0, 4) and found.to_coco(1) == []
    assert found.labels.dtype == torch.int64 and found.centres_px() == []


def test_takes_every_kind_of_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(64, 48).save(path)
    picture = Image.open(path).convert("RGB")
    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    predictor = Predictor(small_detr(), threshold=0.0, size=64)
    kinds = [picture, path, str(path), array, tensor, tensor / 255, tensor.double() / 255, array[:, ::-1][:, ::-1]]
    found = predictor(kinds)
    assert len(found) == len(kinds) and len(found[0]) == 7
    for other in found[1:]:
        assert_same(found[0], other)
    for alone in kinds:
        assert_same(found[0], predictor(alone)[0])
    assert_same(found[0], predictor(tensor[None])[0])


def test_grey_and_palette() -> None:
    predictor = Predictor(small_detr(), threshold=0.0, size=64)
    grey = noise(64, 64).convert("L")
    for same in (np.array(grey), grey.convert("RGB"), grey.convert("P")):
        assert_same(predictor(grey)[0], predictor(same)[0])


def test_batches_of_mixed_sizes_change_nothing() -> None:
    # Sides are multiples of the backbone's 16 pixels, so padding meets no token.
    images = [noise(64, 64), noise(96, 64), noise(64, 128), noise(64, 80), noise(128, 64)]
    model = small_detr(gain=1.0)
    one = Predictor(model, threshold=0.0, size=64)(images)
    three = Predictor(model, threshold=0.0, size=64, batch_size=3)(images)
    assert len({tuple(found.scores.tolist()) for found in one}) == 5
    for left, right in zip(one, three, strict=True):
        by_query = left.queries.argsort(), right.queries.argsort()
        for name in ("scores", "boxes_xyxy_px"):
            first, second = (getattr(found, name)[order] for found, order in zip((left, right), by_query, strict=True))
            torch.testing.assert_close(first, second, atol=1e-5 if name == "scores" else 1e-3, rtol=1e-4)


def test_scales_to_size() -> None:
    model = one_box()
    Predictor(model, size=64, max_size=100, batch_size=2)([noise(60, 30), noise(30, 45)])
    assert [tuple(batch.images.shape) for batch in model.seen] == [(2, 3, 96, 100)]
    shown = ~model.seen[0].mask
    assert [(m.any(1).sum().item(), m.any(0).sum().item()) for m in shown] == [(50, 100), (96, 64)]


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    predictor = Predictor(model_from_args(tiny_args()), threshold=0.0, size=64, max_size=128)
    (found,) = predictor(noise(*size))
    assert found.size == size[::-1] and found.boxes_xyxy_px.isfinite().all() and len(found) > 0


def test_leaves_modes_and_gradients_as_they_were() -> None:
    model = small_detr().train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    first = Predictor(model, threshold=0.0, size=64)(image := noise(64, 64))[0]
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert_same(first, Predictor(model, threshold=0.0, size=64)(image)[0])  # dropout would differ
    assert not first.scores.requires_grad
    model(torch.randn(1, 3, 32, 32))["pred_logits"].sum().backward()
    with pytest.raises(ValueError, match="must be"):
        Predictor(model)(torch.zeros(2, 2))
    assert [module.training for module in model.modules()] == modes


def test_coco_results() -> None:
    (found,) = Predictor(Fixed([[0.0, 0.75]], [[0.5, 0.5, 0.5, 0.25]]))(noise(200, 100))
    assert found.to_coco(139) == [
        {"image_id": 139, "category_id": 1, "bbox": [50.0, 37.5, 100.0, 25.0], "score": pytest.approx(0.75)}
    ]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images must hold at least one image"),
        (np.zeros((4, 4, 3)), r"uint8 \[height, width, 3\] or \[height, width\], got float64 \[4, 4, 3\]"),
        (np.zeros((3, 9, 9), np.uint8), r"got uint8 \[3, 9, 9\]"),
        (np.zeros((0, 9, 3), np.uint8), r"got uint8 \[0, 9, 3\]"),
        (torch.zeros(9, 9, 3), r"an image tensor must be \[3, height, width\], got \[9, 9, 3\]"),
        (torch.full((3, 4, 4), 200.0), "must be in .0, 1. and not normalised, got values from 200 to 200"),
        (torch.full((3, 4, 4), float("nan")), "must be in .0, 1.*got values from nan"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "must be uint8 or floating point, got torch.int64"),
    ],
)
def test_bad_images(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(one_box())(images)


def test_bad_types_and_files(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="PIL images, arrays, tensors or paths, got int"):
        Predictor(one_box())([3])  # type: ignore[list-item]
    with pytest.raises(ImageError, match="missing.jpg"):
        Predictor(one_box())(tmp_path / "missing.jpg")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(one_box(), **settings)


def test_from_checkpoint_has_names_and_sizes(tmp_path: Path) -> None:
    args = tiny_args()
    model = model_from_args(args).eval()
    path = tmp_path / "checkpoint.pth"
    sizes = {"scales": [64, 96], "max_size": 120}
    categories = {number: f"thing {number}" for number in range(4)}
    save_checkpoint({"model": model.state_dict(), "args": vars(args) | sizes, "categories": categories}, path)
    image = noise(100, 80)
    (found,) = Predictor.from_checkpoint(path, threshold=0.0)(image)
    assert_same(found, Predictor(model, threshold=0.0, size=96, max_size=120)(image)[0])
    assert found.names == [categories[label] for label in found.labels.tolist()] and found.names
    other = Predictor.from_checkpoint(path, threshold=0.0, size=64)(image)[0]
    assert not torch.equal(other.scores, found.scores)
    with pytest.raises(CheckpointError, match="nothing.pth"):
        Predictor.from_checkpoint(tmp_path / "nothing.pth")


def test_the_package_has_it_on_demand() -> None:
    assert detr_fast.Predictor is Predictor
    with pytest.raises(AttributeError, match="no attribute 'Predicter'"):
        _ = detr_fast.Predicter
