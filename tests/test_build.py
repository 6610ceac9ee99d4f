"""build_model and model_from_checkpoint: options by the original's names, architecture read off a checkpoint."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from detr_fast import DetrSegm, build_model, detr_resnet50, model_from_checkpoint
from detr_fast.build import load_backbone_weights, model_from_args
from detr_fast.checkpoint import CheckpointError

SMALL = {
    "backbone": "resnet18",
    "hidden_dim": 32,
    "nheads": 4,
    "enc_layers": 1,
    "dec_layers": 2,
    "dim_feedforward": 64,
    "num_queries": 9,
    "num_classes": 4,
    "backbone_weights": "none",
}


def save(model: torch.nn.Module, path, **entries) -> None:
    torch.save({"model": model.state_dict(), **entries}, path)


def test_model_criterion_and_postprocessors() -> None:
    model, criterion, postprocessors = build_model(Namespace(**SMALL, bbox_loss_coef=3, device="cpu"))
    assert model.num_queries == 9 and model.class_embed.out_features == 5
    assert criterion.weight_dict == {
        "loss_ce": 1.0,
        "loss_bbox": 3,
        "loss_giou": 2,
        "loss_ce_0": 1.0,
        "loss_bbox_0": 3,
        "loss_giou_0": 2,
    }
    assert (criterion.matcher.cost_class, criterion.matcher.cost_bbox, criterion.matcher.cost_giou) == (1, 5, 2)
    assert set(postprocessors) == {"bbox"}


@pytest.mark.parametrize(("dataset", "num_classes"), [("coco", 91), ("coco_panoptic", 250), ("mine", 20)])
def test_num_classes_follows_the_data_set_as_in_the_original(dataset: str, num_classes: int) -> None:
    args = {key: value for key, value in SMALL.items() if key != "num_classes"}
    model, criterion, _ = build_model(Namespace(**args, dataset_file=dataset))
    assert model.class_embed.out_features == num_classes + 1 and criterion.num_classes == num_classes


def test_no_auxiliary_losses() -> None:
    model, criterion, _ = build_model(Namespace(**SMALL, aux_loss=False))
    assert "aux_outputs" not in model(torch.randn(1, 3, 32, 32))
    assert set(criterion.weight_dict) == {"loss_ce", "loss_bbox", "loss_giou"}


def test_a_learning_rate_of_zero_freezes_the_backbone() -> None:
    model = model_from_args(Namespace(**SMALL, lr_backbone=0))
    assert not any(p.requires_grad for p in model.backbone.parameters())


@pytest.mark.parametrize("dataset", ["coco", "coco_panoptic"])
def test_masks_as_in_the_original(dataset: str) -> None:
    args = Namespace(**SMALL, masks=True, dataset_file=dataset, mask_loss_coef=2, frozen_weights=None)
    model, criterion, postprocessors = build_model(args)
    assert isinstance(model, DetrSegm) and model.detr.query_embed.weight.requires_grad
    assert criterion.losses == ["labels", "boxes", "cardinality", "masks"]
    assert criterion.weight_dict["loss_mask"] == 2 and criterion.weight_dict["loss_dice_0"] == 1
    assert set(postprocessors) == {"bbox", "segm"} | ({"panoptic"} if dataset == "coco_panoptic" else set())
    if dataset == "coco_panoptic":
        assert postprocessors["panoptic"].is_thing_map == {number: number <= 90 for number in range(201)}


def test_a_frozen_detector_is_not_trained() -> None:
    model, _, _ = build_model(Namespace(**SMALL, masks=True, frozen_weights="detector.pth"))
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"mask_head", "bbox_attention"}


def test_missing_imagenet_weights_are_a_warning_that_says_so(monkeypatch) -> None:
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    args = Namespace(**{**SMALL, "backbone_weights": "imagenet"})
    with pytest.warns(UserWarning, match="no route to host; the backbone starts from random weights"):
        build_model(args)


def test_backbone_weights_of_torchvision_load_without_their_classifier(tmp_path) -> None:
    donor, model = (model_from_args(Namespace(**SMALL)) for _ in range(2))
    body = donor.backbone[0].body.state_dict()
    body |= {
        "fc.weight": torch.zeros(1000, 512),
        "fc.bias": torch.zeros(1000),
        "bn1.num_batches_tracked": torch.tensor(0),
    }
    torch.save(body, tmp_path / "resnet18.pth")
    load_backbone_weights(model, "resnet18", tmp_path / "resnet18.pth")
    assert torch.equal(model.backbone[0].body.conv1.weight, body["conv1.weight"])
    with pytest.raises(CheckpointError, match="no ImageNet weights for the backbone 'tiny'"):
        load_backbone_weights(model, "tiny")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backbone": "tiny", "pre_norm": True},
        {"backbone": "resnet34", "position_embedding": "learned"},
        {"backbone": "resnet50", "dilation": True},
        {"masks": True, "frozen_weights": "detector.pth"},
    ],
)
@pytest.mark.parametrize("with_args", [True, False])
def test_a_checkpoint_alone_rebuilds_its_model(options: dict, with_args: bool, tmp_path) -> None:
    args = {**SMALL, **options}
    model = model_from_args(Namespace(**args)).eval()
    entries = {"args": Namespace(**args), "categories": {1: "cat", 3: "dog"}} if with_args else {}
    save(model, tmp_path / "c.pth", **entries)
    # Without arguments in the file, what no shape tells must be said.
    said = {} if with_args else {"nheads": 4, "dilation": args.get("dilation", False)}
    rebuilt, meta = model_from_checkpoint(tmp_path / "c.pth", **said)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(rebuilt(images)["pred_boxes"], model(images)["pred_boxes"])
    assert not rebuilt.training
    assert meta.categories == ({1: "cat", 3: "dog"} if with_args else {})
    assert meta.args["num_queries"] == 9 and meta.args["backbone"] == args["backbone"]


def test_averaged_weights_are_preferred(tmp_path) -> None:
    model, averaged = model_from_args(Namespace(**SMALL)), model_from_args(Namespace(**SMALL))
    save(model, tmp_path / "c.pth", ema=averaged.state_dict(), args=SMALL)
    before = torch.get_rng_state()
    rebuilt, _ = model_from_checkpoint(tmp_path / "c.pth")
    assert torch.equal(torch.get_rng_state(), before), "random numbers were drawn only to be written over"
    assert torch.equal(rebuilt.query_embed.weight, averaged.query_embed.weight)


def test_a_file_of_another_network_is_refused(tmp_path) -> None:
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="not a DETR checkpoint: it has no 'query_embed.weight'"):
        model_from_checkpoint(tmp_path / "c.pth")
    torch.save({"model": {"mask_head.lay1.weight": torch.zeros(2, 2)}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="not a DETR checkpoint: it has no 'query_embed.weight'"):
        model_from_checkpoint(tmp_path / "c.pth")


def test_presets_load_a_checkpoint_and_name_a_class_head_of_another_size(tmp_path) -> None:
    model = detr_resnet50(num_classes=7)
    save(model, tmp_path / "c.pth")
    before = torch.get_rng_state()
    again = detr_resnet50(num_classes=7, pretrained=tmp_path / "c.pth")
    assert torch.equal(torch.get_rng_state(), before), "random numbers were drawn only to be written over"
    assert all(torch.equal(found, model.state_dict()[key]) for key, found in again.state_dict().items())
    with pytest.raises(CheckpointError, match="class_embed"):
        detr_resnet50(num_classes=8, pretrained=tmp_path / "c.pth")
