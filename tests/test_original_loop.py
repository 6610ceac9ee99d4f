"""A training script of the original DETR keeps working when only the import of ``build_model`` changes.

The loop below makes the calls that such a script makes, on objects that it would have made.
"""

from __future__ import annotations

import argparse
import urllib.error

import pytest
import torch
from small import random_targets
from torch import Tensor

from detr_fast import build_model, model_from_checkpoint

# The original's command line without arguments, but for the paths and the device.
DEFAULTS = argparse.Namespace(
    lr=1e-4,
    lr_backbone=1e-5,
    batch_size=2,
    weight_decay=1e-4,
    epochs=300,
    lr_drop=200,
    clip_max_norm=0.1,
    frozen_weights=None,
    backbone="resnet50",
    dilation=False,
    position_embedding="sine",
    enc_layers=6,
    dec_layers=6,
    dim_feedforward=2048,
    hidden_dim=256,
    dropout=0.1,
    nheads=8,
    num_queries=100,
    pre_norm=False,
    masks=False,
    aux_loss=True,
    set_cost_class=1,
    set_cost_bbox=5,
    set_cost_giou=2,
    mask_loss_coef=1,
    dice_loss_coef=1,
    bbox_loss_coef=5,
    giou_loss_coef=2,
    eos_coef=0.1,
    dataset_file="coco",
    coco_path=None,
    coco_panoptic_path=None,
    remove_difficult=False,
    output_dir="",
    device="cpu",
    seed=42,
    resume="",
    start_epoch=0,
    eval=False,
    num_workers=2,
    world_size=1,
    dist_url="env://",
    distributed=False,
)


class NestedTensor:
    """What such a script's collate function makes: it knows nothing of this library."""

    def __init__(self, tensors: Tensor, mask: Tensor) -> None:
        self.tensors = tensors
        self.mask = mask

    def to(self, device: torch.device) -> NestedTensor:
        return NestedTensor(self.tensors.to(device), self.mask.to(device))

    def decompose(self) -> tuple[Tensor, Tensor]:
        return self.tensors, self.mask


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network in a test")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


def changed(**options) -> argparse.Namespace:
    return argparse.Namespace(**(vars(DEFAULTS) | options))


def small_args() -> argparse.Namespace:
    return changed(backbone="resnet18", enc_layers=1, dec_layers=2, hidden_dim=32, nheads=4, dim_feedforward=64)


def batch() -> tuple[NestedTensor, list[dict[str, Tensor]]]:
    """Two images of which the second is smaller, and targets with all that the original's data set gives."""
    tensors, mask = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:] = mask[1, :, 96:] = True
    tensors[1] *= ~mask[1]
    targets = random_targets([3, 1], num_classes=91)
    for index, (target, size) in enumerate(zip(targets, ((96, 128), (64, 96)), strict=True)):
        count = len(target["labels"])
        target.update(
            image_id=torch.tensor([7 + index]),
            area=torch.rand(count),
            iscrowd=torch.zeros(count, dtype=torch.int64),
            orig_size=torch.tensor([2 * size[0], 2 * size[1]]),
            size=torch.tensor(size),
        )
    return NestedTensor(tensors, mask), targets


def optimizer_of(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trained if "backbone" not in name]},
        {"params": [parameter for name, parameter in trained if "backbone" in name], "lr": args.lr_backbone},
    ]
    assert all(group["params"] for group in groups)
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)


def test_the_defaults_make_the_papers_model():
    with pytest.warns(UserWarning, match="no network in a test.*the backbone starts from random weights"):
        model, criterion, postprocessors = build_model(DEFAULTS)
    # The number that the original prints, which its published training logs show too.
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_302_368
    layers = ["", "_0", "_1", "_2", "_3", "_4"]
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    assert criterion.weight_dict == {name + layer: weight for layer in layers for name, weight in weights.items()}
    assert set(postprocessors) == {"bbox"}


@pytest.mark.filterwarnings("ignore:cannot download ImageNet weights")
def test_the_loop_of_an_epoch():
    args, device = small_args(), torch.device("cpu")
    model, criterion, postprocessors = build_model(args)
    model.to(device)
    optimizer = optimizer_of(model, changed(lr=1e-3))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_drop)
    loaded = batch()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    history = []
    for _ in range(8):
        model.train()
        criterion.train()
        samples, targets = loaded
        samples = samples.to(device)
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        loss_dict = criterion(model(samples), targets)
        weight_dict = criterion.weight_dict
        losses = sum(loss_dict[key] * weight_dict[key] for key in loss_dict if key in weight_dict)
        history.append(losses.item())
        assert all(value.numel() == 1 for value in loss_dict.values())
        optimizer.zero_grad()
        losses.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_max_norm)
        optimizer.step()
    scheduler.step()

    per_layer = {"loss_ce", "loss_bbox", "loss_giou", "cardinality_error"}
    assert set(loss_dict) == per_layer | {"class_error"} | {f"{name}_0" for name in per_layer}
    assert history[-1] < history[0]
    frozen = ("backbone.0.body.conv1", "backbone.0.body.bn1", "backbone.0.body.layer1")
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved != name.startswith(frozen), name
    check_evaluation(model, criterion, postprocessors, loaded)


@torch.no_grad()
def check_evaluation(model, criterion, postprocessors, loaded) -> None:
    model.eval()
    criterion.eval()
    samples, targets = loaded
    outputs = model(samples)
    assert criterion(outputs, targets)["loss_ce"].isfinite()
    sizes = torch.stack([target["orig_size"] for target in targets], dim=0)
    results = postprocessors["bbox"](outputs, sizes)
    by_image = {target["image_id"].item(): result for target, result in zip(targets, results, strict=True)}
    assert set(by_image) == {7, 8}
    for result, (height, width) in zip(results, sizes.tolist(), strict=True):
        assert result["scores"].shape == result["labels"].shape == (100,)
        centre = (result["boxes"][:, :2] + result["boxes"][:, 2:]) / 2
        assert ((centre > 0) & (centre < torch.tensor([width, height]))).all()
        assert result["labels"].max() < 91


@pytest.mark.filterwarnings("ignore:cannot download ImageNet weights")
def test_its_checkpoint_is_read_without_running_its_pickle(tmp_path):
    """The original saves its argument Namespace inside, which a safe reader does not take from just anyone."""
    args = small_args()
    model = build_model(args)[0]
    optimizer = optimizer_of(model, args)
    contents = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "args": args}
    torch.save(contents, tmp_path / "checkpoint.pth")
    rebuilt, meta = model_from_checkpoint(tmp_path / "checkpoint.pth")
    assert meta.args["backbone"] == "resnet18"
    samples, _ = batch()
    with torch.no_grad():
        expected, outputs = model.eval()(samples), rebuilt(samples)
    torch.testing.assert_close(outputs["pred_logits"], expected["pred_logits"], rtol=0, atol=0)
