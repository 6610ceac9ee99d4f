"""Attention maps: the right weights, at the right places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_ins import Fixed, noise, small_detr
from torch import Tensor, nn

from benchmarks.original_transformer import OriginalTransformer
from detr_fast import DetrDemo, ImageBatch
from detr_fast.attention_maps import PointError, capture_attention, draw_attention, point_tokens
from detr_fast.models.tokens import TokenLayout
from detr_fast.predict import Predictor


def originals_weights(model: Any, batch: ImageBatch) -> tuple[Tensor, Tensor]:
    """Of the last encoder and decoder layer of a transformer made of PyTorch's own layers, mean over the heads."""
    original = OriginalTransformer(16, 2, 2, 2, 16).eval().double()
    original.load_state_dict(model.transformer.state_dict())
    features, pos = model.backbone(batch)
    src = model.input_proj(features[-1].images)
    original(src, features[-1].mask, model.query_embed.weight, pos[-1])
    return original.encoder.layers[-1].weights, original.decoder.layers[-1].weights


def test_maps_are_those_of_pytorchs_layers() -> None:
    # In float64: with attention as sharp as this, rounding shows.
    model = small_detr().eval().double()
    batch = ImageBatch.of([torch.randn(3, 48, 80).double(), torch.randn(3, 64, 32).double()])
    with torch.no_grad(), capture_attention(model) as capture:
        model(batch)
        decoder, encoder = capture.decoder_maps(torch.tensor([5, 0])), capture.encoder_maps(torch.tensor([0, 3, 16]))
        assert capture.feature_size == (4, 5)
        expected_encoder, expected_decoder = originals_weights(model, batch)
    torch.testing.assert_close(decoder, expected_decoder[:, [5, 0]].unflatten(-1, (4, 5)))
    expected = expected_encoder[:, [0, 3, 16]].unflatten(-1, (4, 5))
    # Place 16, the second of the last row, is padding in the first image; place 3, the fourth of the first, in the
    # second.
    expected[0, 2], expected[1, 1] = 0, 0
    torch.testing.assert_close(encoder, expected)
    torch.testing.assert_close(decoder.sum((2, 3)), torch.ones(2, 2).double())
    assert (decoder[0, :, 3] == 0).all() and (decoder[1, :, :, 2:] == 0).all(), "padding is not looked at"
    assert decoder.std() > 0.01, "the maps are not flat"


def test_maps_are_the_same_where_the_host_does_not_know_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    # In float64: with attention as sharp as this, rounding shows.
    model = small_detr().eval().double()
    batch = ImageBatch.of([torch.randn(3, 48, 80).double(), torch.randn(3, 64, 32).double()])
    cells = torch.tensor([0, 6])
    with torch.no_grad(), capture_attention(model) as capture:
        model(batch)
        expected = capture.decoder_maps(cells), capture.encoder_maps(cells)
        with monkeypatch.context() as patched:
            patched.setattr(TokenLayout, "of", staticmethod(padded_layout))
            model(batch)
        assert capture.inputs["encoder"].key_layout.padding is not None
        torch.testing.assert_close((capture.decoder_maps(cells), capture.encoder_maps(cells)), expected)


def padded_layout(mask: Tensor, sizes: object = None) -> TokenLayout:
    batch, height, width = mask.shape
    return TokenLayout.full(batch, (height, width), mask.device, mask.flatten(1))


def number_of_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_afterwards() -> None:
    model = small_detr()
    with capture_attention(model):
        assert number_of_hooks(model) == 2
    assert number_of_hooks(model) == 0
    with pytest.raises(RuntimeError, match="stop"), capture_attention(model):
        raise RuntimeError("stop")
    assert number_of_hooks(model) == 0
    with pytest.raises(ValueError, match="samples must hold at least one image"), capture_attention(model):
        model([])
    assert number_of_hooks(model) == 0


def test_bad_models() -> None:
    for model in (Fixed([[0.5]], [[0.5] * 4]), nn.Identity(), DetrDemo(4, 16, 2, 1, 1)):
        with (
            pytest.raises(TypeError, match=f"model must be a Detr .*got {type(model).__name__}"),
            capture_attention(model),
        ):
            pass
        assert number_of_hooks(model) == 0
    with (
        capture_attention(small_detr()) as capture,
        pytest.raises(RuntimeError, match="no decoder attention was captured"),
    ):
        capture.decoder_maps(torch.tensor([0]))


def test_point_tokens() -> None:
    # An image of 100 x 200 pixels on 5 x 4 tokens, each 50 pixels wide and 20 high.
    points = [(0, 0), (49.9, 19.9), (50, 0), (0, 20), (199, 99), (200, 100)]
    assert point_tokens(points, (100, 200), (5, 4)).tolist() == [0, 0, 1, 4, 19, 19]
    assert point_tokens([], (100, 200), (5, 4)).shape == (0,)
    for point in [(-1, 5), (201, 5), (5, 100.5), (float("nan"), 5)]:
        with pytest.raises(PointError, match="points must lie inside the image of 200x100 pixels"):
            point_tokens([point], (100, 200), (5, 4))


def test_attention_of_an_image() -> None:
    model = small_detr().train()
    predictor = Predictor(model, threshold=0.0, size=64)
    image = noise(200, 100)
    maps = predictor.attention(image, max_detections=3)
    assert model.training and number_of_hooks(model) == 0
    found = predictor(image)[0].first(3)
    assert maps.prediction.queries.tolist() == found.queries.tolist() and maps.points_px == found.centres_px()
    assert maps.decoder.shape == (3, 4, 8) and maps.encoder.shape == (3, 4, 8)
    torch.testing.assert_close(maps.encoder.sum((1, 2)), torch.ones(3))
    chosen = predictor.attention(image, points_px=[(10, 10), (190, 90)], max_detections=1)
    assert chosen.decoder.shape == (1, 4, 8) and chosen.encoder.shape == (2, 4, 8)
    torch.testing.assert_close(chosen.decoder, maps.decoder[:1])
    with pytest.raises(PointError, match="got \\(300, 10\\)"):
        predictor.attention(image, points_px=[(300, 10)])


@pytest.mark.parametrize(
    ("size", "threshold"), [((200, 100), 0.0), ((200, 100), 1.0), ((20, 300), 0.0), ((3000, 40), 0.0), ((1, 1), 1.0)]
)
def test_figure(tmp_path: Path, size: tuple[int, int], threshold: float) -> None:
    predictor = Predictor(small_detr(), {1: "dog"}, threshold=threshold, size=32, max_size=64)
    maps = predictor.attention(noise(*size).resize(size), max_detections=2)
    columns = 2 if threshold == 0 else 1
    assert len(maps.decoder) == (2 if threshold == 0 else 0) and len(maps.encoder) == columns
    figure = draw_attention(maps, tmp_path / "figure.png")
    assert len(figure.axes) == 1 + len(maps.decoder) + len(maps.encoder)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == ("detections and points" if threshold == 0 else "no detection above the threshold")
    assert titles[-1] == f"encoder, point {columns}"
    for axes in figure.axes:
        assert axes.get_xlim() == (0, size[0]) and axes.get_ylim() == (size[1], 0)
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.format == "PNG" and max(picture.size) < 2500
