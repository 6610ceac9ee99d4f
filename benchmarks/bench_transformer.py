"""DETR's transformer on the feature maps of real images, against the original way.

``original`` is made of ``nn.MultiheadAttention`` as the original calls it, ``original-sdpa`` is the same without the
mean attention weights that nobody reads, so that PyTorch may use its own fused attention. A training step is a forward
and a backward pass with dropout 0.1, without the optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import where
from benchmarks.harness import Contest, Contestant
from benchmarks.marks import marked
from benchmarks.original_transformer import OriginalTransformer
from benchmarks.shapes import MAP_SHAPES, ONE_MAP, SMALL_MIXED_MAPS, MapShape
from detr_fast import Transformer

Race = Callable[[str, str, Callable[[], Contest]], None]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor]
CONTESTANTS = ("original", "original-sdpa", "detr_fast")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("shape", marked(MAP_SHAPES, lambda shape: shape != ONE_MAP))
def test_inference(race: Race, shape: MapShape, contestant: str) -> None:
    race(f"transformer inference {shape.name}", contestant, lambda: inference(shape))


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("shape", marked([ONE_MAP, SMALL_MIXED_MAPS], lambda shape: shape != ONE_MAP))
def test_training(race: Race, shape: MapShape, contestant: str) -> None:
    race(f"transformer training {shape.name}", contestant, lambda: training(shape))


def models(dropout: float) -> dict[str, nn.Module]:
    """All contestants, with the same weights."""
    torch.manual_seed(0)
    ours = Transformer(d_model=256, dropout=dropout, return_intermediate_dec=True)
    found: dict[str, nn.Module] = {
        "original": OriginalTransformer(dropout=dropout),
        "original-sdpa": OriginalTransformer(dropout=dropout, need_weights=False),
    }
    for model in found.values():
        model.load_state_dict(ours.state_dict())
    return {name: model.to(where.device()) for name, model in {**found, "detr_fast": ours}.items()}


def inputs(shape: MapShape) -> Arguments:
    """src, mask, query_embed, pos_embed."""
    batch, frame = len(shape.sizes), shape.frame
    mask = torch.ones(batch, *frame, dtype=torch.bool)
    for image, (height, width) in zip(mask, shape.cells, strict=True):
        image[:height, :width] = False
    src, pos = torch.randn(batch, 256, *frame), torch.randn(batch, 256, *frame)
    device = where.device()
    return src.to(device), mask.to(device), torch.randn(shape.num_queries, 256, device=device), pos.to(device)


def inference(shape: MapShape) -> Contest:
    """Embeddings of the last layers, of all of them equal to float64's."""
    contestants, arguments = models(0.0), inputs(shape)
    src, mask, query_embed, pos = arguments

    def run(name: str) -> Tensor:
        more = [shape.cells] if name == "detr_fast" else []
        with torch.inference_mode():
            return contestants[name].eval()(*arguments, *more)[0]

    with torch.inference_mode():
        exact = OriginalTransformer().eval().double().to(where.device())
        exact.load_state_dict(contestants["original"].state_dict())
        expected = exact(src.double(), mask, query_embed.double(), pos.double())[0].float()
    return Contest(
        [Contestant(name, partial(run, name)) for name in CONTESTANTS],
        lambda hs: torch.testing.assert_close(hs, expected, rtol=1e-4, atol=1e-4),
        str(where.device()),
    )


def training(shape: MapShape) -> Contest:
    """Gradients of all parameters. Dropout draws differ, so only their size and direction can be checked."""
    contestants, arguments = models(0.1), inputs(shape)
    weights = torch.randn(6, len(shape.sizes), shape.num_queries, 256, device=where.device())

    def run(model: nn.Module, more: list[object]) -> Tensor:
        hs = model(*arguments, *more)[0]
        gradients = torch.autograd.grad((hs * weights).mean(), list(model.parameters()))
        return dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))[NAME]

    without = models(0.0)["original"].eval()
    expected = run(without, [])

    def check(gradient: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.5 and 0.5 < gradient.norm() / expected.norm() < 2, f"{cosine=}, {gradient.norm()=}"

    return Contest(
        [
            Contestant(name, partial(run, model.train(), [shape.cells] if name == "detr_fast" else []))
            for name, model in contestants.items()
        ],
        check,
        str(where.device()),
    )


# Of the first layer, so that it has gone through all of the backward pass.
NAME = "encoder.layers.0.linear1.weight"
