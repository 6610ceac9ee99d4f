"""The mask head: upsampling inside a convolution, masks on demand, chunks, freezing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import small_detr
from torch import Tensor, nn

from detr_fast import Backbone, Detr, DetrSegm, Joiner, PositionEmbeddingSine
from detr_fast.models.detr import detect
from detr_fast.models.segmentation import MaskHead
from detr_fast.models.upsampled_conv import upsampled_conv


def small_segm(**options) -> DetrSegm:
    joiner = Joiner(Backbone("resnet18", True, True, False), PositionEmbeddingSine(8, normalize=True))
    return DetrSegm(Detr(joiner, small_detr().transformer, 5, 7, aux_loss=True), **options).double()


def images() -> list[Tensor]:
    return [torch.randn(3, 75, 100, dtype=torch.float64), torch.randn(3, 64, 50, dtype=torch.float64)]


@pytest.mark.parametrize("size", [(8, 12), (7, 12), (8, 11), (7, 11), (4, 6), (9, 9), (16, 5), (3, 6)])
def test_upsampled_conv_is_the_convolution_of_the_upsampled_map(size: tuple[int, int]) -> None:
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, padding=1)
    ours = upsampled_conv(x, weight, size)
    torch.testing.assert_close(ours, plain, atol=1e-13, rtol=1e-13)
    seen = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), seen), torch.autograd.grad(plain, (x, weight), seen), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_upsampled_conv_of_a_single_pixel(size: tuple[int, int]) -> None:
    x, weight = torch.randn(1, 5, 1, 1), torch.randn(2, 5, 3, 3)
    plain = F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, padding=1)
    torch.testing.assert_close(upsampled_conv(x, weight, size), plain)


def plain_head(head: MaskHead, attention: Tensor, projected: Tensor, pyramid: list[Tensor]) -> Tensor:
    """The figure, layer by layer, for one image: [Q, H, h, w] to [Q, h', w']."""
    x = torch.cat((projected.expand(len(attention), -1, -1, -1), attention), 1)
    x = head.gn1(head.lay1(x)).relu()
    x = head.gn2(head.lay2(x)).relu()
    for layer, norm, adapter, level in zip(
        (head.lay3, head.lay4, head.lay5),
        (head.gn3, head.gn4, head.gn5),
        (head.adapter1, head.adapter2, head.adapter3),
        pyramid,
        strict=True,
    ):
        x = adapter(level) + F.interpolate(x, size=level.shape[-2:], mode="nearest")
        x = norm(layer(x)).relu()
    return head.out_lay(x)[:, 0]


def test_the_head_is_the_figures() -> None:
    head = MaskHead(16 + 2, [12, 10, 6], 16).double()
    attention = torch.rand(3, 2, 5, 4, dtype=torch.float64)
    projected = torch.randn(1, 16, 5, 4, dtype=torch.float64)
    sizes = ((12, 9, 8), (10, 18, 15), (6, 36, 30))
    pyramid = [torch.randn(1, *size, dtype=torch.float64) for size in sizes]
    expected = plain_head(head, attention, projected, pyramid)
    got = head(attention, head.image_maps(projected, pyramid))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    assert expected.std() > 0.1


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_masks_on_demand_are_those_of_the_dense_tensor(chunk: int) -> None:
    model, samples = small_segm(chunk=chunk).eval(), images()
    dense = model(samples)["pred_masks"]
    lazy = model(samples, lazy_masks=True)["pred_masks"]
    assert dense.shape == lazy.shape == (2, 7, 19, 25)
    index = (torch.tensor([1, 0, 0, 1, 1]), torch.tensor([6, 2, 3, 0, 0]))
    torch.testing.assert_close(lazy[index], dense[index])


class SavedNumbers:
    """Counts the numbers that autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += x.numel()
        return x


def test_chunks_change_no_gradient_and_hold_less() -> None:
    index = (torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 4, 2, 2, 6]))
    model, samples = small_segm().train(), images()
    gradients, held = [], []
    for chunk in (1, 2, 100):
        model.chunk, saved = chunk, SavedNumbers()
        model.zero_grad()
        lazy = model(samples)["pred_masks"]
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda x: x):
            masks = lazy[index]
        (masks.sin() * torch.arange(5.0)[:, None, None]).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        held.append(saved.count)
    assert "mask_head.lay1.weight" in gradients[0] and "detr.query_embed.weight" in gradients[0]
    for name, expected in gradients[-1].items():
        for other in gradients[:-1]:
            torch.testing.assert_close(other[name], expected, atol=1e-10, rtol=1e-9, msg=name)
    assert max(held[:2]) < held[2] / 2


def test_no_query_asked_for_gives_gradients_of_zero() -> None:
    model = small_segm().train()
    none = torch.zeros(0, dtype=torch.int64)
    masks = model(images())["pred_masks"][none, none]
    assert masks.shape == (0, 19, 25)
    masks.sum().backward()
    assert all(bool((p.grad == 0).all()) for p in model.mask_head.parameters())


def test_a_frozen_detector_gets_no_gradient_and_drops_nothing() -> None:
    detr = small_segm().detr.train()
    detr.transformer.decoder.layers[0].dropout1.p = 0.5
    model = DetrSegm(detr, freeze_detr=True).double().train()
    assert model.training and model.mask_head.training and not detr.training
    outputs = model(images())
    assert not outputs["pred_logits"].requires_grad
    outputs["pred_masks"][torch.tensor([0]), torch.tensor([1])].sum().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"mask_head", "bbox_attention"}
    assert not any(p.requires_grad for p in detr.parameters())


def test_masks_are_computed_in_the_precision_of_their_forward_pass() -> None:
    model = small_segm().float().train()
    with torch.autocast("cpu", torch.bfloat16):
        masks = model([x.float() for x in images()])["pred_masks"]
    assert masks[torch.tensor([0]), torch.tensor([1])].dtype == torch.bfloat16


def test_detection_alone_computes_no_mask_and_one_layer() -> None:
    model = small_segm().eval()
    model.mask_head.register_forward_pre_hook(lambda *_: pytest.fail("a mask was computed"))
    outputs = detect(model, images())
    assert set(outputs) == {"pred_logits", "pred_boxes", "pred_masks"}
    assert outputs["pred_masks"].shape[:2] == (2, 7)


def test_what_has_no_pyramid_is_refused() -> None:
    with pytest.raises(ValueError, match="fpn_dims must be given"):
        DetrSegm(small_detr())
    with pytest.raises(ValueError, match="fpn_dims must be three numbers"):
        MaskHead(18, [8, 8], 16)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        small_segm(chunk=0)
    model = small_segm()
    model.detr.backbone[0].return_interm_layers = False
    with pytest.raises(ValueError, match="four feature maps .* got 1"):
        model(images())


def test_attention_maps_leave_padding_out_and_sum_to_one() -> None:
    attention = small_segm().bbox_attention
    padding = torch.zeros(1, 3, 4, dtype=torch.bool)
    padding[:, :, 3:] = True
    maps = attention(torch.randn(1, 7, 16).double(), torch.randn(1, 16, 3, 4).double(), padding)
    assert maps.shape == (1, 7, 2, 3, 4) and bool((maps[..., 3] == 0).all())
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(1, 7).double())
    assert isinstance(attention, nn.Module)
