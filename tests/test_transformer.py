"""The transformer on tokens without padding: against PyTorch's own layers, whatever images are padded to."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small import small_detr
from torch import Tensor, nn

from benchmarks.original_transformer import OriginalTransformer
from detr_fast import ImageBatch, Transformer
from detr_fast.models.attention import MultiHeadAttention, project_memory
from detr_fast.models.tokens import TokenLayout
from detr_fast.ops import TokenOffsets

WIDTH, HEADS, INNER, QUERIES = 16, 2, 32, 7
CPU = torch.device("cpu")
# Heights and widths of three images in a frame of 5 x 7 cells: a wide one, a high one, a single cell.
SIZES = ((3, 7), (5, 4), (1, 1))
FRAME = (5, 7)


def transformer(dropout: float = 0.0, layers: int = 2, **options) -> Transformer:
    return Transformer(WIDTH, HEADS, layers, layers, INNER, dropout, return_intermediate_dec=True, **options)


def randomised(module: nn.Module) -> nn.Module:
    """With biases that are not zero, and sharp attention."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2).add_(0.1 * torch.randn_like(parameter))
    return module


def inputs(sizes=SIZES, frame=FRAME) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """src, mask, query_embed, pos_embed; what lies in the padding is large, so that it shows."""
    mask = torch.ones(len(sizes), *frame, dtype=torch.bool)
    for image, (height, width) in zip(mask, sizes, strict=True):
        image[:height, :width] = False
    src, pos = (torch.randn(len(sizes), WIDTH, *frame) + 1e3 * mask[:, None] for _ in range(2))
    return src, mask, torch.randn(QUERIES, WIDTH), pos


def dense(mask: Tensor, sizes=None, device=None) -> TokenLayout:
    """What a mask on another device gives: nobody on the host knows what is padding."""
    return TokenLayout.full(len(mask), mask.shape[1:], mask.device, mask.flatten(1))


def answers(model: nn.Module, dtype: torch.dtype, arguments: tuple[Tensor, ...], *sizes) -> list[Tensor]:
    """hs, the memory of valid cells, and the gradients of features, queries, positions and parameters."""
    src, mask, *others = arguments
    src, query_embed, pos = (x.to(dtype).detach().requires_grad_() for x in (src, *others))
    model = copy.deepcopy(model).to(dtype)
    hs, memory = model(src, mask, query_embed, pos, *sizes)
    memory = memory.masked_fill(mask[:, None], 0)
    weighted = [(x * torch.linspace(-1, 1, x.numel()).view(x.shape).sin()).sum() for x in (hs, memory)]
    leaves = [src, query_embed, pos, *(parameter for _, parameter in sorted(model.named_parameters()))]
    return [x.double() for x in (hs, memory, *torch.autograd.grad(sum(weighted), leaves))]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("known", ["sizes", "mask", "nothing"])
def test_it_is_the_originals(known: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = randomised(transformer()).train(training), OriginalTransformer(WIDTH, HEADS, 2, 2, INNER, 0.0)
    theirs.load_state_dict(ours.state_dict())
    src, mask, query_embed, pos = inputs()
    src, pos = (x.masked_fill(mask[:, None], 1.0) for x in (src, pos))  # theirs computes on padding
    arguments, sizes = (src, mask, query_embed, pos), [SIZES] if known == "sizes" else []
    if known == "nothing":
        monkeypatch.setattr(TokenLayout, "of", staticmethod(dense))
    exact = answers(theirs, torch.float64, arguments)
    torch.testing.assert_close(answers(ours, torch.float64, arguments, *sizes), exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("training", [False, True])
def test_float32_is_as_exact_as_the_originals(training: bool) -> None:
    errors = torch.zeros(2, dtype=torch.float64)
    for _ in range(5):
        ours, theirs = randomised(transformer()).train(training), OriginalTransformer(WIDTH, HEADS, 2, 2, INNER, 0.0)
        theirs.load_state_dict(ours.state_dict())
        src, mask, query_embed, pos = inputs()
        arguments = (src.masked_fill(mask[:, None], 1.0), mask, query_embed, pos.masked_fill(mask[:, None], 1.0))
        exact = answers(theirs, torch.float64, arguments)
        for index, found in enumerate(answers(model, torch.float32, arguments) for model in (ours, theirs)):
            errors[index] += sum((a - b).norm() / b.norm().clamp(min=1) for a, b in zip(found, exact, strict=True))
    assert 0 < errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_image_does_not_see_the_rest_of_the_batch(normalize_before: bool, training: bool) -> None:
    model = randomised(transformer(normalize_before=normalize_before)).train(training)
    src, mask, query_embed, pos = inputs()
    together, memory = model(src, mask, query_embed, pos, SIZES)
    for image, (height, width) in enumerate(SIZES):
        own = slice(image, image + 1), ..., slice(height), slice(width)
        alone, own_memory = model(src[own], mask[image : image + 1, :height, :width], query_embed, pos[own])
        torch.testing.assert_close(together[:, image], alone[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(memory[own], own_memory, atol=1e-5, rtol=1e-5)
    assert (memory.masked_select(mask[:, None]) == 0).all()
    assert together.std(1).mean() > 0.01, "the images matter"


def test_a_mask_of_any_form_is_followed() -> None:
    model = randomised(transformer()).eval()
    src, _, query_embed, pos = inputs(sizes=[FRAME])
    mask = torch.rand(1, *FRAME) < 0.4
    valid = ~mask[0]
    hs, memory = model(src, mask, query_embed, pos)
    # The same tokens in one row.
    row_src, row_pos = src[:, :, valid][:, :, None], pos[:, :, valid][:, :, None]
    expected, row = model(row_src, torch.zeros(1, *row_src.shape[2:], dtype=torch.bool), query_embed, row_pos)
    torch.testing.assert_close(hs, expected)
    torch.testing.assert_close(memory[:, :, valid], row[:, :, 0])


@pytest.mark.parametrize("known", [True, False])
def test_an_image_that_is_all_padding_changes_nothing(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr(TokenLayout, "of", staticmethod(dense))
    model = randomised(transformer())
    src, mask, query_embed, pos = inputs(((5, 7), (0, 0)))
    src.requires_grad_()
    hs, _ = model(src, mask, query_embed, pos)
    alone, _ = model(src[:1], mask[:1], query_embed, pos[:1])
    torch.testing.assert_close(hs[:, :1], alone)
    assert hs.isfinite().all()
    hs.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()) and src.grad[0].isfinite().all()


def test_layouts() -> None:
    _, mask, _, _ = inputs()
    for layout in (TokenLayout.of(mask, SIZES), TokenLayout.of(mask)):
        assert layout.offsets.lengths == (21, 20, 1) and layout.offsets.offsets.tolist() == [0, 21, 41, 42]
        assert layout.frame == FRAME and layout.padding is None
        maps = torch.randn(3, 2, *FRAME)
        tokens = layout.pack(maps)
        torch.testing.assert_close(tokens[21], maps[1, :, 0, 0])
        torch.testing.assert_close(tokens[21 + 4], maps[1, :, 1, 0])
        torch.testing.assert_close(layout.unpack(tokens), maps.masked_fill(mask[:, None], 0))
        # Row 1, column 3 is cell 10: token 10 of the first image, token 7 of the second, padding in the third.
        assert layout.tokens_at(torch.tensor([10, 0])).tolist() == [[10, 0], [7, 0], [-1, 0]]
    for full in (TokenLayout.of(mask[:1] & False, [FRAME]), TokenLayout.of(mask[:1] & False)):
        assert full.index is None and full.padding is None and full.offsets.lengths == (35,)


def test_attention_is_torchs() -> None:
    ours, theirs = MultiHeadAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict())
    x, x_pos, memory, memory_pos = (torch.randn(length, 32) for length in (5, 5, 9, 9))
    own, other = (TokenLayout(1, (1, length), TokenOffsets.of([length], CPU)) for length in (5, 9))
    expected, _ = theirs(x_pos[None], x_pos[None], x[None])
    torch.testing.assert_close(ours(*ours.project_self(x, x_pos), own, own), expected[0])
    expected, _ = theirs(x_pos[None], memory_pos[None], memory[None])
    ((key, value),) = project_memory([ours], memory, memory_pos)
    torch.testing.assert_close(ours(ours.project_query(x_pos), key, value, own, other), expected[0])
    same = torch.randn(1, 32)
    expected, _ = theirs(x_pos[None], x_pos[None], same.expand(1, 5, -1))
    torch.testing.assert_close(ours.of_equal_values(same).expand(5, -1), expected[0])


def test_several_layers_project_the_memory_at_once() -> None:
    layers = [randomised(MultiHeadAttention(WIDTH, HEADS)) for _ in range(3)]
    memory, memory_pos = torch.randn(11, WIDTH), torch.randn(11, WIDTH)
    for layer, found in zip(layers, project_memory(layers, memory, memory_pos), strict=True):
        ((key, value),) = project_memory([layer], memory, memory_pos)
        torch.testing.assert_close(found, (key, value))


@pytest.mark.parametrize("normalize_before", [False, True])
def test_checkpointing_changes_nothing(normalize_before: bool) -> None:
    plain = randomised(transformer(dropout=0.3, normalize_before=normalize_before))
    saving = transformer(dropout=0.3, normalize_before=normalize_before, activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    arguments, gradients, kept = inputs(), [], []
    for model in (plain, saving):
        torch.manual_seed(0)
        numbers: list[int] = []

        def keep(x: Tensor, numbers: list[int] = numbers) -> Tensor:
            numbers.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hs, _ = model(*arguments)
        gradients.append(torch.autograd.grad(hs.square().sum(), list(model.parameters())))
        kept.append(sum(numbers))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_can_be_copied(copied) -> None:
    model = randomised(transformer()).eval()
    arguments = inputs()
    with torch.inference_mode():
        expected = model(*arguments)[0]  # whatever it keeps for the next call is kept
        torch.testing.assert_close(copied(model)(*arguments)[0], expected, rtol=0, atol=0)


def test_the_model_compiles_and_exports_as_one_graph() -> None:
    model = small_detr().eval()
    batch = ImageBatch.of([torch.randn(3, 48, 80), torch.randn(3, 64, 32)])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for training in (False, True):
        model.train(training)
        for samples in (batch.images, batch):
            torch.testing.assert_close(compiled(samples), model(samples), atol=1e-5, rtol=1e-5)
    count = len(graphs)
    # Other images in a frame of the same size: the graphs are those.
    compiled(ImageBatch.of([torch.randn(3, 64, 80), torch.randn(3, 16, 20)]))
    assert len(graphs) == count > 0
    exported = torch.export.export(model.eval(), (batch.images,))
    torch.testing.assert_close(exported.module()(batch.images), model(batch.images), atol=1e-5, rtol=1e-5)


def test_the_exported_model_takes_any_number_of_images() -> None:
    model, images = small_detr().eval(), torch.randn(3, 3, 32, 48)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (images, images[:2], torch.randn(5, 3, 32, 48)):
        torch.testing.assert_close(exported.module()(batch), model(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_is_as_exact_as_the_originals(training: bool) -> None:
    ours, theirs = transformer().train(training), OriginalTransformer(WIDTH, HEADS, 2, 2, INNER, 0.0)
    theirs.load_state_dict(ours.state_dict())
    src, mask, query_embed, pos = inputs()
    src, pos = (x.masked_fill(mask[:, None], 1.0) for x in (src, pos))
    exact = answers(theirs, torch.float64, (src, mask, query_embed, pos))
    with torch.autocast("cpu", torch.bfloat16):
        found, peers = (answers(model, torch.float32, (src, mask, query_embed, pos)) for model in (ours, theirs))
    for index, (a, b, wanted) in enumerate(zip(found[:2], peers[:2], exact[:2], strict=True)):
        assert 0 < (a - wanted).norm() <= 2 * (b - wanted).norm(), f"output {index}"
    size = torch.stack([x.norm() for x in exact]).norm()
    if training:  # in eval mode one row stands for all queries of the first layer, and its gradient is rounded once
        for a, b, wanted in zip(found[2:], peers[2:], exact[2:], strict=True):
            assert (a - wanted).norm() <= 2 * (b - wanted).norm() + 1e-2 * size
