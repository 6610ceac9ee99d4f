"""CUDA graphs in inference: which batches get one, and that answers are the model's. The capture is played."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from small import small_detr
from test_optimize import resnet_detr
from torch import Tensor, nn

from detr_fast import ImageBatch, optimize
from detr_fast.attention_maps import capture_attention
from detr_fast.graphed_inference import CudaCapture, GraphedForward, GraphSizes, without_graphs
from detr_fast.models.detr import detect
from detr_fast.models.segmentation import DetrSegm, QueryMasks
from detr_fast.predictor import Predictor

NAMES = ("pred_logits", "pred_boxes")


class Player:
    """Plays a capture: like a graph it reads its inputs where they lie, and writes over its last outputs."""

    captured: ClassVar[list[tuple[int, ...]]] = []
    replays: ClassVar[list[tuple[int, ...]]] = []

    def __call__(self, run: Callable[[Tensor, Tensor], Any], images: Tensor, mask: Tensor) -> Callable[[], Any]:
        self.captured.append(tuple(images.shape))
        assert not torch.is_grad_enabled() and not images.is_inference()
        outputs = run(images, mask)

        def replay() -> Any:
            self.replays.append(tuple(images.shape))
            with torch.no_grad():
                for old, new in zip(tensors(outputs), tensors(run(images, mask)), strict=True):
                    old.copy_(new)
            return outputs

        return replay


def tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, QueryMasks):
        yield from (outputs.attention, *outputs.maps)
    else:
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from tensors(value)


@pytest.fixture(autouse=True)
def nothing_played() -> None:
    Player.captured.clear()
    Player.replays.clear()


def graphed(model: nn.Module, **sizes: int) -> nn.Module:
    """A copy that runs by graphs."""
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    fast.forward = GraphedForward(fast, GraphSizes(**sizes), capture=Player, device_type="cpu")  # type: ignore
    return fast


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def test_a_size_is_captured_when_it_comes_again() -> None:
    model = small_detr().eval()
    fast = graphed(model, most=2)
    shapes = [(1, 32, 48), (1, 64, 32), (1, 32, 48), (2, 32, 48), (2, 32, 48), (1, 64, 32), (1, 64, 32), (1, 32, 48)]
    found, expected = [], []
    for batch, height, width in shapes:
        images = torch.randn(batch, 3, height, width)
        found.append(fast(images))
        expected.append(model(images))
    assert Player.captured == [(1, 3, 32, 48), (2, 3, 32, 48)], "the third size comes too late"
    assert len(Player.replays) == 3
    # Compared at the end: what a call gave is not written over by the next.
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_padded_batches() -> None:
    model = small_detr().eval()
    fast = graphed(model)
    for sizes in ([(32, 48), (64, 32)], [(64, 48), (16, 16)], [(64, 48), (64, 48)]):
        images = [torch.randn(3, *size) for size in sizes]
        assert_same(fast(images), model(images))
    assert Player.captured == [(2, 3, 64, 48)] and len(Player.replays) == 1, "a batch without padding has its own"
    fast(torch.randn(2, 3, 64, 48))
    assert len(Player.captured) == 2


def test_sizes_that_share_a_graph() -> None:
    model = small_detr().eval()
    fast = graphed(model, multiple=64)
    for height, width in ((50, 64), (64, 40), (64, 64), (33, 64), (65, 64), (64, 64)):
        image = torch.randn(3, height, width)
        # As any model takes an image in a larger frame.
        frame = ImageBatch.of([image, torch.zeros(3, height + -height % 64, 64)])
        with torch.no_grad():
            expected = {name: model(frame)[name][:1] for name in NAMES}
        assert_same(fast(image[None]), expected)
    # An image that fills the frame has no padding to be told of, and a graph of its own.
    assert Player.captured == [(1, 3, 64, 64)] * 2 and len(Player.replays) == 3


def test_threads_take_turns() -> None:
    model = small_detr().eval()
    fast = graphed(model)
    images = [torch.randn(1, 3, 16 * height, 32) for height in (1, 2, 3, 2) * 10]
    with torch.no_grad():
        expected = [model(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fast, images))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
    assert len(Player.captured) == 3 and len(Player.replays) == len(images) - 3


@pytest.mark.parametrize("lazy", [True, False])
def test_masks(lazy: bool) -> None:
    model = DetrSegm(resnet_detr(all_maps=True)).eval()
    fast = graphed(optimize(model))
    images = [torch.randn(1, 3, 64, 96) for _ in range(3)]
    with torch.inference_mode():
        found = [fast(image, lazy_masks=lazy)["pred_masks"] for image in images]
        for masks, image in zip(found, images, strict=True):
            assert isinstance(masks, QueryMasks) == lazy
            expected = model(image, lazy_masks=False)["pred_masks"]
            torch.testing.assert_close(masks.dense() if lazy else masks, expected, rtol=1e-3, atol=1e-3)
        fast(images[0], lazy_masks=not lazy)
    assert len(Player.captured) == 1 and len(Player.replays) == 2, "other options are another graph"
    with pytest.raises(ValueError, match="multiple must be 1 for a model with masks, got 32"):
        graphed(model, multiple=32)


def test_outputs_that_are_asked_for() -> None:
    fast = graphed(resnet_detr())
    assert inspect.signature(fast.forward).parameters.keys() == {"samples", "aux_outputs"}
    images = torch.randn(1, 3, 64, 64)
    for _ in range(3):
        assert "aux_outputs" not in detect(fast, images)
        assert len(fast(images, aux_outputs=True)["aux_outputs"]) == 1
    assert len(Player.captured) == 2


def test_hooks_are_called_where_attention_is_captured() -> None:
    fast = graphed(resnet_detr())
    images = torch.randn(1, 3, 64, 96)
    for _ in range(2):
        fast(images)
    with capture_attention(fast) as capture:
        fast(images)
    assert capture.feature_size == (2, 3) and len(Player.replays) == 1
    with without_graphs():
        fast(images)
    assert len(Player.replays) == 1
    fast(images)
    assert len(Player.replays) == 2


def test_training_and_gradients_run_the_model_itself() -> None:
    fast, images = graphed(small_detr()), torch.randn(1, 3, 32, 32)
    for _ in range(3):
        fast.train()(images)
        leaf = images.clone().requires_grad_()
        fast.eval()(leaf)["pred_logits"].sum().backward()
        assert leaf.grad is not None and leaf.grad.any()
    assert not Player.captured


def test_inference_mode_and_without_it() -> None:
    fast, images = graphed(small_detr()), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = [fast(images) for _ in range(3)][-1]
    assert_same(fast(images), expected)
    with torch.no_grad():
        assert_same(fast(images), expected)
    assert len(Player.captured) == 1 and len(Player.replays) == 4


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_capture_for_themselves(again: Callable[[nn.Module], nn.Module]) -> None:
    fast, images = graphed(small_detr(), most=3), torch.randn(1, 3, 32, 32)
    expected = [fast(images) for _ in range(2)][-1]
    other = again(fast)
    assert other.forward.model is other and other.forward.sizes == GraphSizes(most=3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    for _ in range(2):
        assert not torch.allclose(other(images)["pred_logits"], expected["pred_logits"])
        assert_same(fast(images), expected)
    assert len(Player.captured) == 2


def test_a_model_that_was_moved_is_captured_anew() -> None:
    fast, images = graphed(small_detr()), torch.randn(1, 3, 32, 32)
    expected = [fast(images) for _ in range(2)][-1]
    fast.double()
    for _ in range(2):
        assert_same({name: x.float() for name, x in fast(images.double()).items() if name in NAMES}, expected)
    assert len(Player.captured) == 2
    with torch.no_grad():
        fast.class_embed.bias.add_(1)  # in place: a graph reads what is there
    changed = fast(images.double())["pred_logits"].float()
    torch.testing.assert_close(changed, expected["pred_logits"] + 1, rtol=1e-5, atol=1e-5)
    assert len(Player.captured) == 2


def test_an_error_while_capturing_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, images = graphed(small_detr()), torch.randn(1, 3, 32, 32)
    expected = fast(images)

    def fails(self: Player, *_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Player, "__call__", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            fast(images)
    assert_same(fast(images), expected)
    assert len(Player.captured) == 1


def test_predictor_runs_by_graphs() -> None:
    model = resnet_detr()
    fast = graphed(optimize(model))
    pictures = list(np.random.default_rng(0).integers(0, 255, (4, 40, 60, 3), np.uint8))
    found = Predictor(fast, threshold=0, size=64)(pictures)
    expected = Predictor(model, threshold=0, size=64)(pictures)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-5, rtol=0)
        assert ours.scores.is_inference() == theirs.scores.is_inference()
    assert len(Player.replays) == 3


def test_optimize_asks_for_a_gpu_and_a_detr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda_graph cannot be used here: torch finds no CUDA device"):
        optimize(small_detr(), cuda_graph=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(TypeError, match="cuda_graph needs a Detr or a DetrSegm, got a Sequential"):
        optimize(nn.Sequential(), cuda_graph=True)
    model = resnet_detr()
    fast = optimize(model, cuda_graph=GraphSizes(most=5), dtype=torch.bfloat16)
    assert fast.forward.sizes.most == 5 and fast.forward.model is fast and fast.forward.capture is CudaCapture
    assert_same(fast(images := torch.randn(1, 3, 32, 32)), optimize(model, dtype=torch.bfloat16)(images))
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        GraphSizes(most=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_a_gpu() -> None:
    model = resnet_detr("resnet50").eval().cuda()
    with torch.inference_mode():
        for dtype in (None, torch.bfloat16):
            plain, fast = optimize(model, dtype=dtype), optimize(model, dtype=dtype, cuda_graph=True)
            for side in (64, 96, 64, 96, 64, 96):
                images = torch.randn(2, 3, side, 128, device="cuda")
                for name in NAMES:
                    torch.testing.assert_close(fast(images)[name], plain(images)[name], rtol=1e-2, atol=1e-2)
            assert len(fast.forward._graphs.of) == 2
