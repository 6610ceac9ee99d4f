"""Optimised copies: the model's answers, in every form of the model, from any thread, at any size, without leaks."""

from __future__ import annotations

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from small import PatchBackbone, random_targets, small_criterion, small_detr
from test_golden import fill, golden_images, golden_model, known
from torch import Tensor, nn

import detr_fast
from detr_fast import Detr, DetrDemo, ImageBatch, Joiner, PositionEmbeddingSine, Transformer, optimize
from detr_fast.data.images import load_image
from detr_fast.data.transforms import eval_transforms
from detr_fast.evaluate import evaluate
from detr_fast.models.backbone import Backbone, BasicBlock, ResNet
from detr_fast.models.packed_resnet import PackedResNet, Workspace, Workspaces, folded
from detr_fast.models.segmentation import DetrSegm
from detr_fast.optimize import optimizes
from detr_fast.postprocess import PostProcess
from detr_fast.predictor import Predictor

NAMES = ("pred_logits", "pred_boxes")


def resnet_detr(name: str = "resnet18", *, all_maps: bool = False, aux_loss: bool = True) -> Detr:
    """A small model on a real ResNet whose batch norms do something."""
    backbone = Backbone(name, train_backbone=True, return_interm_layers=all_maps, dilation=False)
    transformer = Transformer(16, 2, 1, 2, 32, return_intermediate_dec=True)
    model = Detr(Joiner(backbone, PositionEmbeddingSine(8, normalize=True)), transformer, 5, 7, aux_loss=aux_loss)
    for key, buffer in model.named_buffers():
        nn.init.uniform_(buffer, 0.4, 0.6) if key.endswith("weight") else nn.init.uniform_(buffer, 0.5, 1.5)
    return model


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("variant", ["r50", "r50_dc5", "r101"])
def test_outputs_are_the_originals(variant: str) -> None:
    answer, model = known(variant), optimize(golden_model(variant))
    with torch.inference_mode():
        for _ in range(2):  # the second call writes over the first one's memory
            outputs = model(golden_images())
    assert set(outputs) == set(NAMES)
    for name in NAMES:
        np.testing.assert_allclose(outputs[name].numpy(), answer[name], atol=5e-6, rtol=5e-6)


def test_masks_are_the_originals() -> None:
    answer, model = known("r50_panoptic"), optimize(golden_model("r50_panoptic"))
    with torch.inference_mode():
        outputs = model(golden_images(), lazy_masks=True)
        model([torch.randn(3, 256, 288), torch.randn(3, 300, 192)])  # what a mask needs is not written over
        masks = outputs["pred_masks"].dense().numpy()
    for name in NAMES:
        np.testing.assert_allclose(outputs[name].numpy(), answer[name], atol=5e-6, rtol=5e-6)
    # Against float64 the known masks are off by up to 8.8e-6; ours may be off by twice as much.
    np.testing.assert_allclose(masks[:, [0, 7, 99]], answer["pred_masks_q0_q7_q99"], atol=2.7e-5, rtol=0)


def test_the_demo_model_gives_the_demos_answer() -> None:
    answer = known("demo")
    with torch.inference_mode():
        outputs = optimize(fill(DetrDemo(num_classes=91)))(golden_images()[0][None])
    for name in NAMES:
        np.testing.assert_allclose(outputs[name].numpy(), answer[name], atol=5e-6, rtol=5e-6)


def test_boxes_of_real_images(shared_data: Path) -> None:
    paths = sorted((shared_data / "coco200" / "images" / "val2017").glob("*.jpg"))[:4]
    transform = eval_transforms(160, 320)
    batch = ImageBatch.of([transform(load_image(path), {})[0] for path in paths])
    model = golden_model("r50").eval()
    with torch.inference_mode():
        expected, found = model(batch)["pred_boxes"], optimize(model)(batch)["pred_boxes"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_bfloat16_is_near() -> None:
    model = resnet_detr("resnet50").eval()
    images = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        expected, found = model(images), optimize(model, dtype=torch.bfloat16)(images)
    for name in NAMES:
        assert found[name].dtype == torch.float32
        error = (found[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert 0 < error < 0.1


def test_the_model_itself_stays_as_it_was() -> None:
    model = resnet_detr()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = optimize(model)
    assert model.training and not fast.training and model.aux_loss and not fast.aux_loss
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert any(p.requires_grad for p in model.parameters()) and not any(p.requires_grad for p in fast.parameters())
    assert isinstance(fast.backbone[0].body, PackedResNet) and isinstance(model.backbone[0].body, ResNet)


def test_the_copy_keeps_nothing_of_the_model() -> None:
    model, images = resnet_detr().eval(), torch.randn(1, 3, 64, 96)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    fast = optimize(model)
    expected = fast(images)["pred_boxes"].clone()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    again = optimize(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(again(images)["pred_boxes"], expected)


def test_outputs_of_earlier_layers_where_they_are_asked_for() -> None:
    model, images = resnet_detr().eval(), torch.randn(1, 3, 64, 64)
    expected, found = model(images)["aux_outputs"], optimize(model, aux_outputs=True)(images)["aux_outputs"]
    assert len(found) == 1
    torch.testing.assert_close(found[0]["pred_boxes"], expected[0]["pred_boxes"])


def test_other_backbones_stay_as_they_are() -> None:
    model, images = small_detr().eval(), torch.randn(2, 3, 48, 64)
    fast = optimize(model)
    assert isinstance(fast.backbone[0].body, PatchBackbone)
    torch.testing.assert_close(fast(images)["pred_boxes"], model(images)["pred_boxes"])


def test_a_resnet_with_other_norms_stays_as_it_is() -> None:
    net, images = (
        ResNet(BasicBlock, (1, 1, 1, 1), norm=lambda width: nn.GroupNorm(2, width), width=8),
        torch.randn(1, 3, 40, 64),
    )
    model = nn.Sequential(net)
    assert not optimizes(model) and optimizes(resnet_detr()) and not optimizes(small_detr())
    for ours, theirs in zip(optimize(model)(images), model(images), strict=True):
        assert torch.equal(ours, theirs)


def test_float64_stays_float64() -> None:
    net, images = ResNet(BasicBlock, (1, 1, 1, 1), width=8).double(), torch.randn(1, 3, 40, 64, dtype=torch.float64)
    for ours, theirs in zip(optimize(nn.Sequential(net))(images), net(images), strict=True):
        torch.testing.assert_close(ours, theirs.detach())


def test_predictor_runs_a_copy_unless_told_not_to() -> None:
    model, picture = resnet_detr(), np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    fast, plain = (Predictor(model, threshold=0, size=64, optimized=choice) for choice in (True, False))
    assert isinstance(fast.model.backbone[0].body, PackedResNet) and plain.model is model
    (found,), (expected,) = fast(picture), plain(picture)
    torch.testing.assert_close(found.boxes_xyxy_px, expected.boxes_xyxy_px, atol=1e-3, rtol=0)
    own = small_detr()
    assert Predictor(own).model is own
    assert Predictor(own, optimized={}).model is not own
    with pytest.raises(ValueError, match="dtype must be .*, got torch.float16"):
        Predictor(own, optimized={"dtype": torch.float16})


class Collector:
    """Stands in for an evaluator that keeps what it is given."""

    iou_types = ("bbox",)

    def __init__(self) -> None:
        self.found: dict[int, dict[str, Tensor]] = {}

    def update(self, found: dict[int, dict[str, Tensor]]) -> None:
        self.found.update(found)

    def synchronize(self) -> None:
        pass

    def summarize(self) -> dict[int, dict[str, Tensor]]:
        return self.found


def test_evaluate_measures_a_copys_losses_of_all_layers() -> None:
    model, targets = resnet_detr(), random_targets([2, 1])
    labelled = [
        {**target, "image_id": torch.tensor(number), "orig_size": torch.tensor([64, 96])}
        for number, target in enumerate(targets)
    ]
    loader, settings = [(torch.randn(2, 3, 64, 96), labelled)], {"postprocess": PostProcess(), "device": "cpu"}
    (fast, losses), (plain, expected) = (
        evaluate(model, loader, evaluator=Collector(), criterion=small_criterion(), optimized=choice, **settings)
        for choice in (True, False)
    )
    assert model.training and "loss_bbox_0" in expected and losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(fast[1]["boxes"], plain[1]["boxes"], atol=1e-3, rtol=0)


def test_pickles_copies_and_threads_agree() -> None:
    fast = optimize(resnet_detr())
    images = [torch.randn(1, 3, 32 * height, 32 * width) for height, width in ((1, 2), (3, 2), (2, 4), (4, 1)) * 4]
    with torch.inference_mode():
        expected = [fast(image)["pred_boxes"] for image in images]
    # Those that come fresh out of a pickle or a copy pack their weights in all threads at once.
    fresh = [copy_of(fast) for _ in range(10) for copy_of in (lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy)]
    for other in (*fresh, fast):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda image, model=other: model(image)["pred_boxes"], images))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_call_in_inference_mode_leaves_memory_that_others_can_use() -> None:
    fast, images = optimize(resnet_detr()), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = fast(images)["pred_boxes"]
    torch.testing.assert_close(fast(images)["pred_boxes"], expected)
    with torch.no_grad():
        torch.testing.assert_close(fast(images)["pred_boxes"], expected)


def test_memory_is_flat_over_a_thousand_calls_of_any_size() -> None:
    body = PackedResNet(ResNet(BasicBlock, (1, 1, 1, 1), width=8), all_maps=False)
    draw = random.Random(0)
    sizes = [(draw.randint(1, 320), draw.randint(1, 320)) for _ in range(1000)]
    with torch.inference_mode():
        for height, width in [(320, 320), *sizes[:100]]:
            body(torch.zeros(1, 3, height, width))
        before = resident_bytes()
        for height, width in sizes:
            body(torch.zeros(1, 3, height, width))
    # The largest image takes 1.2 MB, its largest map 0.8.
    assert resident_bytes() - before < 4 << 20


def test_maps_of_a_workspace_do_not_overlap() -> None:
    workspace, shape, other = Workspace(), (2, 8, 5, 7), (2, 8, 3, 1)
    workspace.reserve(2 * 576 + 100, torch.zeros(1))
    first, second, between = workspace.take(0, shape), workspace.take(1, shape), workspace.between()
    assert first.shape == second.shape == shape and first.is_contiguous(memory_format=torch.channels_last)
    assert len(between) >= 100 and all(x.data_ptr() % 64 == 0 for x in (first, second, between))
    for number, x in enumerate((first, second, between)):
        x.fill_(number)
    assert all((x == number).all() for number, x in enumerate((first, second, between)))
    workspace.give(0)
    assert workspace.between().data_ptr() == first.data_ptr()
    assert workspace.take(0, other).data_ptr() == first.data_ptr() and len(workspace.between()) > 100 + 500
    assert workspace.take(1, other).data_ptr() > second.data_ptr() and (first == 0).all()


def test_an_error_gives_the_workspace_back() -> None:
    workspaces = Workspaces()
    with pytest.raises(ZeroDivisionError), workspaces.one() as first:
        raise ZeroDivisionError
    with workspaces.one() as second, workspaces.one() as third:
        assert second is first and third is not first


def test_a_change_of_dtype_goes_through_all_weights() -> None:
    net, images = ResNet(BasicBlock, (1, 1, 1, 1), width=8), torch.randn(1, 3, 64, 64)
    packed = PackedResNet(net)
    for ours, theirs in zip(packed.double()(images.double()), net.double()(images.double()), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_maps_for_masks() -> None:
    detr = resnet_detr(all_maps=True)
    segm, images = DetrSegm(detr).eval(), torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(optimize(segm)(images)["pred_masks"], segm(images)["pred_masks"], atol=1e-4, rtol=1e-4)


def test_the_copy_can_be_exported() -> None:
    fast, images = optimize(resnet_detr()), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        program = torch.export.export(fast, (images,))
    torch.testing.assert_close(program.module()(images)["pred_boxes"], fast(images)["pred_boxes"])


def test_folding_a_bias_and_an_ordinary_norm() -> None:
    conv, norm, x = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6).eval(), torch.randn(2, 4, 5, 7)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    torch.testing.assert_close(detr_fast.ops.conv(x, folded(conv, norm)), norm(conv(x)).detach())


@pytest.mark.parametrize(
    ("conv", "norm", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), "one group"),
        (nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), "got GroupNorm"),
        (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), "with statistics"),
    ],
)
def test_what_cannot_be_folded(conv: nn.Module, norm: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folded(conv, norm)
