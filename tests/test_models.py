"""The model's parts: inputs it takes, what padding may change, options, and checkpoints by name."""

from __future__ import annotations

import math

import pytest
import torch
from small import PatchBackbone, small_detr
from torch import nn

import detr_fast
from detr_fast import Detr, DetrDemo, ImageBatch, Joiner, PositionEmbeddingLearned, PositionEmbeddingSine, Transformer
from detr_fast.models.backbone import Backbone, BasicBlock, FrozenBatchNorm2d, ResNet
from detr_fast.models.detr import detect
from detr_fast.models.presets import build_backbone


class NestedTensorLike:
    """What the original's training scripts hand over."""

    def __init__(self, tensors, mask) -> None:
        self.tensors, self.mask = tensors, mask


def test_every_kind_of_input_gives_the_same_answer() -> None:
    model, images = small_detr().eval(), torch.randn(2, 3, 64, 48)
    batch = ImageBatch.of(images)
    answers = [
        model(x)["pred_boxes"]
        for x in (images, list(images), batch, NestedTensorLike(batch.images, batch.mask), tuple(images))
    ]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0])


def test_outputs() -> None:
    outputs = small_detr(num_classes=5, num_queries=7)(torch.randn(2, 3, 32, 64))
    assert outputs["pred_logits"].shape == (2, 7, 6)
    assert outputs["pred_boxes"].shape == (2, 7, 4)
    assert ((outputs["pred_boxes"] > 0) & (outputs["pred_boxes"] < 1)).all()
    assert len(outputs["aux_outputs"]) == 2
    assert all(set(aux) == {"pred_logits", "pred_boxes"} for aux in outputs["aux_outputs"])


def test_outputs_of_earlier_layers_can_be_left_out() -> None:
    model, images = small_detr().eval(), torch.randn(2, 3, 32, 64)
    every = model(images)
    assert "aux_outputs" in every, "as the original's, in eval mode too"
    last = model(images, aux_outputs=False)
    assert set(last) == {"pred_logits", "pred_boxes"}
    for key, value in last.items():
        torch.testing.assert_close(value, every[key])
    model.aux_loss = False
    assert set(model(images)) == {"pred_logits", "pred_boxes"}
    assert len(model(images, aux_outputs=True)["aux_outputs"]) == 2


def test_detect_asks_for_no_more_than_it_needs() -> None:
    model, images = small_detr().eval(), torch.randn(1, 3, 32, 64)
    layers: list[int] = []
    model.class_embed.register_forward_pre_hook(lambda _, args: layers.append(len(args[0])))
    assert set(detect(model, images)) == {"pred_logits", "pred_boxes"}
    assert len(detect(model, images, aux_outputs=None)["aux_outputs"]) == 2
    assert layers == [1, 3]

    class Plain(nn.Module):
        def forward(self, samples):
            return {"pred_logits": samples}

    assert detect(Plain(), images)["pred_logits"] is images


@pytest.mark.parametrize("normalize_before", [False, True])
def test_padding_does_not_change_an_images_answer(normalize_before: bool) -> None:
    model = small_detr(normalize_before=normalize_before).eval()
    image, other = torch.randn(3, 48, 32), torch.randn(3, 80, 96)
    alone, padded = model([image]), model([image, other])
    torch.testing.assert_close(padded["pred_boxes"][:1], alone["pred_boxes"])
    torch.testing.assert_close(padded["pred_logits"][:1], alone["pred_logits"])


def test_dropout_acts_in_training_only() -> None:
    model, images = small_detr(dropout=0.5), torch.randn(1, 3, 64, 64)
    assert not torch.equal(model(images)["pred_logits"], model(images)["pred_logits"])
    model.eval()
    assert torch.equal(model(images)["pred_logits"], model(images)["pred_logits"])


def test_transformer_returns_the_last_layer_alone_unless_asked() -> None:
    arguments = (torch.randn(2, 16, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool), torch.randn(7, 16))
    pos = torch.randn(2, 16, 3, 4)
    layers = Transformer(16, 2, 1, 3, 32, 0.0, return_intermediate_dec=True).eval()
    last = Transformer(16, 2, 1, 3, 32, 0.0).eval()
    last.load_state_dict(layers.state_dict())
    hs, memory = layers(*arguments, pos)
    assert hs.shape == (3, 2, 7, 16) and memory.shape == (2, 16, 3, 4)
    torch.testing.assert_close(last(*arguments, pos)[0], hs[-1:])


def test_sine_positions_follow_the_formula() -> None:
    mask = torch.ones(1, 4, 6, dtype=torch.bool)
    mask[0, :3, :5] = False  # a valid rectangle of 3 x 5 tokens
    pos = PositionEmbeddingSine(8, normalize=True)(ImageBatch(torch.zeros(1, 1, 4, 6), mask))
    assert pos.shape == (1, 16, 4, 6)
    y, x = 2 / 3 * 2 * math.pi, 4 / 5 * 2 * math.pi  # token of row 1, column 3, counted from 1
    for pair in range(4):
        wavelength = 10000 ** (2 * pair / 8)
        expected = [f(a / wavelength) for a in (y, x) for f in (math.sin, math.cos)]
        found = [pos[0, base + 2 * pair + odd, 1, 3].item() for base in (0, 8) for odd in (0, 1)]
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_sine_positions_are_the_same_however_the_padding_is_known(normalize: bool) -> None:
    encoding = PositionEmbeddingSine(8, normalize=normalize)
    batch = ImageBatch.of([torch.zeros(1, 4, 6), torch.zeros(1, 7, 2)])
    known, found = encoding(batch), encoding(ImageBatch(batch.images, batch.mask))
    assert batch.sizes is not None and known.shape == found.shape == (2, 16, 7, 6)
    assert torch.equal(known[0, :, :4, :6], found[0, :, :4, :6])
    assert torch.equal(known[1, :, :, :2], found[1, :, :, :2])
    full = torch.zeros(1, 1, 5, 3)
    assert torch.equal(encoding(ImageBatch.of(full)), encoding(ImageBatch(full, torch.zeros(1, 5, 3) > 0)))


def test_sine_positions_need_normalize_for_a_scale() -> None:
    with pytest.raises(ValueError, match="scale needs normalize=True"):
        PositionEmbeddingSine(8, scale=1.0)


def test_learned_positions_end_at_50() -> None:
    pos = PositionEmbeddingLearned(4)
    features = ImageBatch.of(torch.zeros(2, 1, 3, 50))
    assert pos(features).shape == (2, 8, 3, 50)
    torch.testing.assert_close(pos(features)[1, :, 2, 7], torch.cat((pos.col_embed.weight[7], pos.row_embed.weight[2])))
    with pytest.raises(ValueError, match="end at 50 x 50 tokens, got a map of 3 x 51"):
        pos(ImageBatch.of(torch.zeros(1, 1, 3, 51)))


def test_frozen_batch_norm_is_batch_norm_in_eval_mode() -> None:
    ordinary, frozen = nn.BatchNorm2d(6).eval(), FrozenBatchNorm2d(6)
    for name in ("weight", "bias", "running_mean"):
        nn.init.normal_(getattr(ordinary, name))
    nn.init.uniform_(ordinary.running_var, 0.5, 2)
    frozen.load_state_dict(ordinary.state_dict())  # with num_batches_tracked, which is ignored
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(frozen(x), ordinary(x))
    assert not list(frozen.parameters())


@pytest.mark.parametrize(("name", "stride", "channels"), [("resnet18", 32, 512), ("resnet50", 32, 2048)])
def test_backbone_maps_and_masks(name: str, stride: int, channels: int) -> None:
    backbone = Backbone(name, train_backbone=True, return_interm_layers=True, dilation=False)
    maps = backbone(ImageBatch.of([torch.randn(3, 64, 96), torch.randn(3, 32, 64)]))
    assert [m.images.shape[-2:] for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert maps[-1].images.shape[1] == backbone.num_channels == channels
    assert maps[-1].mask[1].tolist() == [[False, False, True], [True, True, True]]


def test_dilation_doubles_the_resolution_of_the_last_map() -> None:
    backbone = Backbone("resnet50", train_backbone=True, return_interm_layers=False, dilation=True)
    (last,) = backbone(ImageBatch.of(torch.randn(1, 3, 64, 64)))
    assert last.images.shape == (1, 2048, 4, 4)
    with pytest.raises(ValueError, match="only bottleneck ResNets"):
        Backbone("resnet18", train_backbone=True, return_interm_layers=False, dilation=True)


@pytest.mark.parametrize(("train", "expected"), [(True, {"layer2", "layer3", "layer4"}), (False, set())])
def test_the_stem_and_first_stage_are_frozen(train: bool, expected: set[str]) -> None:
    backbone = Backbone("resnet18", train_backbone=train, return_interm_layers=False, dilation=False)
    assert {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad} == expected


def test_any_module_can_be_the_backbone() -> None:
    class NoChannels(nn.Module):
        pass

    class FlatOutput(PatchBackbone):
        def forward(self, images):
            return self.patch(images).flatten(2)

    with pytest.raises(ValueError, match="NoChannels must have an integer attribute num_channels"):
        Detr(NoChannels(), Transformer(16, 2), 5, 7)
    with pytest.raises(ValueError, match=r"must return one map \[B, 8, h, w\], got \[1, 8, 4\]"):
        Detr(FlatOutput(), Transformer(16, 2, 1, 1), 5, 7)(torch.randn(1, 3, 32, 32))
    body = ResNet(BasicBlock, (1, 1, 1, 1), norm=nn.BatchNorm2d, width=8)
    assert [m.shape[1] for m in body(torch.randn(2, 3, 64, 64))] == body.stage_channels == [8, 16, 32, 64]


def test_a_joiner_of_the_original_is_taken_as_it_is() -> None:
    class TheirJoiner(nn.Sequential):
        num_channels = 8

        def forward(self, samples):
            features = self[0](samples)
            return features, [self[1](x) for x in features]

    ours = build_backbone("tiny", hidden_dim=16)
    theirs = TheirJoiner(ours[0], ours[1])
    theirs.num_channels = ours.num_channels
    assert Detr(theirs, Transformer(16, 2, 1, 1), 5, 7).backbone is theirs
    assert isinstance(ours, Joiner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet51"}, "backbone must be one of resnet18"),
        ({"name": "tiny", "dilation": True}, "'tiny' has no dilation"),
        ({"name": "resnet18", "position_embedding": "v4"}, "position_embedding must be 'sine' or 'learned', got 'v4'"),
    ],
)
def test_backbone_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(**options)


def test_the_demo_model_refuses_a_map_beyond_its_positions() -> None:
    model = DetrDemo(num_classes=3, hidden_dim=32, nheads=2, num_encoder_layers=1, num_decoder_layers=1)
    assert model(torch.randn(2, 3, 64, 64))["pred_boxes"].shape == (2, 100, 4)
    with pytest.raises(ValueError, match="50 x 50 tokens, got a map of 1 x 51"):
        model(torch.randn(1, 3, 32, 1632))


def test_the_originals_spellings_are_aliases() -> None:
    assert detr_fast.DETR is Detr and detr_fast.DETRdemo is DetrDemo


def test_it_trains_under_autocast_and_exports_as_one_graph() -> None:
    model = small_detr()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(torch.randn(2, 3, 32, 32))
    outputs["pred_logits"].float().sum().backward()
    assert model.input_proj.weight.grad is not None
    images = torch.randn(1, 3, 32, 48)
    exported = torch.export.export(model.eval(), (images,))
    torch.testing.assert_close(exported.module()(images)["pred_boxes"], model(images)["pred_boxes"])
