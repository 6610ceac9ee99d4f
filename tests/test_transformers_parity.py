"""The whole detector against an independent implementation: the DETR of the ``transformers`` package.

Both get the same random weights. Nothing is downloaded: the model is made from its configuration, with the package's
own ResNet as the backbone.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from benchmarks.transformers_weights import our_name, our_state_dict
from detr_fast.criterion import SetCriterion
from detr_fast.data.batch import ImageBatch
from detr_fast.matcher import HungarianMatcher
from detr_fast.models.detr import Detr
from detr_fast.models.presets import detr_resnet50

NUM_CLASSES = 91


def randomise(model: nn.Module) -> None:
    """Weights that leave no part of the model without influence, and no activation out of proportion.

    Attention has to be sharp and its output small, or the queries drift to one common value from layer to layer.
    """
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(std=0.1)
            elif "norm" in name:
                value.uniform_(*((0.3, 1) if "backbone" in name else (0.8, 1.2)))
            elif "query" in name:
                value.normal_()
            else:
                gain = 2 if re.search(r"[qk]_proj", name) else 0.5 if re.search(r"[vo]_proj", name) else 1
                value.normal_(std=gain * (2 / value[0].numel()) ** 0.5)


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, Detr]:
    """(theirs, ours) with the same weights, in eval mode."""
    transformers = pytest.importorskip("transformers", reason="the test extra has transformers")
    backbone = transformers.ResNetConfig(out_features=["stage4"])
    # auxiliary_loss stays off: with it, transformers 5 feeds the normalised output of a decoder layer to the next.
    config = transformers.DetrConfig(use_timm_backbone=False, backbone_config=backbone, num_labels=NUM_CLASSES)
    theirs = transformers.DetrForObjectDetection(config)
    # One set of weights for all tests, made before their own seeds; the inputs are new in each.
    torch.manual_seed(0)
    randomise(theirs)
    ours = detr_resnet50(num_classes=NUM_CLASSES)
    ours.load_state_dict(our_state_dict(theirs.state_dict()), strict=True)
    # With this backbone theirs freezes all of it; the paper freezes the stem and the first stage.
    trained = {name: parameter.requires_grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.model.backbone.named_parameters(prefix="model.backbone"):
        parameter.requires_grad_(trained[our_name(name)])
    return theirs.eval(), ours.eval()


def padded_batch() -> ImageBatch:
    return ImageBatch.of([torch.randn(3, 96, 160), torch.randn(3, 130, 64)])


def unpadded_batch() -> ImageBatch:
    return ImageBatch.of(torch.randn(2, 3, 96, 128))


def targets_for(counts: tuple[int, ...]) -> list[dict[str, Tensor]]:
    def boxes(count: int) -> Tensor:
        size = 0.05 + 0.3 * torch.rand(count, 2)
        return torch.cat([size / 2 + torch.rand(count, 2) * (1 - size), size], 1)

    return [{"labels": torch.randint(NUM_CLASSES, (count,)), "boxes": boxes(count)} for count in counts]


@pytest.mark.parametrize("make_batch", [unpadded_batch, padded_batch])
def test_outputs_agree(models, make_batch):
    theirs, ours = models
    batch = make_batch()
    assert batch.mask.any() == (make_batch is padded_batch)
    with torch.no_grad():
        expected = theirs(pixel_values=batch.tensors, pixel_mask=(~batch.mask).long())
        outputs = ours(batch)

    # The inputs have to matter, or anything would agree: queries differ, and so do images.
    assert expected.logits.std(1).mean() > 0.01
    assert expected.pred_boxes.std(1).mean() > 0.001
    assert (expected.logits[0] - expected.logits[1]).abs().max() > 0.01
    torch.testing.assert_close(outputs["pred_logits"], expected.logits, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(outputs["pred_boxes"], expected.pred_boxes, rtol=1e-5, atol=1e-5)


def test_padding_is_seen_by_both(models):
    """With the mask left out the answer is another one, so agreement under padding says something."""
    _, ours = models
    batch = padded_batch()
    with torch.no_grad():
        difference = ours(batch)["pred_logits"] - ours(batch.tensors)["pred_logits"]
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("counts", [(4, 2), (0, 3)])
def test_losses_and_gradients_agree(models, counts):
    """In float64: in float32 two orders of summation differ in where a ReLU opens, by 2e-4 of a gradient."""
    theirs, ours = (copy.deepcopy(model).double() for model in models)
    batch, targets = padded_batch(), targets_for(counts)
    batch = ImageBatch(batch.images.double(), batch.mask, batch.sizes)
    targets = [{"labels": target["labels"], "boxes": target["boxes"].double()} for target in targets]
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    torch.set_default_dtype(torch.float64)  # their criterion makes its weights in it
    try:
        expected = theirs(pixel_values=batch.tensors, pixel_mask=(~batch.mask).long(), labels=labels)
    finally:
        torch.set_default_dtype(torch.float32)

    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    matcher = HungarianMatcher(cost_class=1, cost_bbox=5, cost_giou=2)
    criterion = SetCriterion(NUM_CLASSES, matcher, weights, eos_coef=0.1, losses=["labels", "boxes", "cardinality"])
    losses = criterion(ours(batch), targets)
    for name in (*weights, "cardinality_error"):
        torch.testing.assert_close(losses[name], expected.loss_dict[name], rtol=1e-6, atol=1e-7, check_dtype=False)
    total = sum(weight * losses[name] for name, weight in weights.items())
    torch.testing.assert_close(total, expected.loss, rtol=1e-6, atol=1e-7, check_dtype=False)

    compare_gradients(theirs, ours, expected.loss, total)


def compare_gradients(theirs: nn.Module, ours: Detr, their_loss: Tensor, our_loss: Tensor) -> None:
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    their_gradients = torch.autograd.grad(their_loss, list(trained.values()))
    expected = our_state_dict(dict(zip(trained, their_gradients, strict=True)))
    trained_here = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert trained_here.keys() == expected.keys()
    gradients = torch.autograd.grad(our_loss, list(trained_here.values()))
    # Rounding of the whole shows in parts whose own gradient is zero: the first decoder layer attends to zeros.
    rounding = 1e-8 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert rounding > 0
    for name, gradient in zip(trained_here, gradients, strict=True):
        difference, size = (gradient - expected[name]).norm(), expected[name].norm()
        assert difference <= 1e-6 * size + rounding, f"gradient of {name}: {difference=} where the norm is {size}"
