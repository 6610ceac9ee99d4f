"""An image's predictions on real images: the same alone, in a batch, and whatever it is padded to."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from detr_fast import Detr, ImageBatch, Transformer
from detr_fast.data.transforms import eval_transforms
from detr_fast.models.backbone import _valid_cells
from detr_fast.models.presets import build_backbone

SHORTER_SIDE_PX = 192


def four_shapes(folder: Path) -> list[Image.Image]:
    """The widest and the highest picture and two between, so that each has padding of its own."""
    paths = sorted((folder / "coco200" / "images").rglob("*.jpg"))
    if not paths:
        pytest.skip(f"needs images in {folder / 'coco200'}")
    pictures = sorted((Image.open(path) for path in paths), key=lambda picture: picture.width / picture.height)
    return [pictures[i].convert("RGB") for i in (0, len(pictures) // 3, len(pictures) // 2, -1)]


@pytest.mark.parametrize(
    ("dilation", "position_embedding"),
    [(False, "sine"), (True, "sine"), (False, "learned")],
    ids=["r50", "dc5", "learned"],
)
def test_an_image_is_what_it_is(shared_data: Path, dilation: bool, position_embedding: str) -> None:
    backbone = build_backbone("resnet50", hidden_dim=256, dilation=dilation, position_embedding=position_embedding)
    model = Detr(backbone, Transformer(256, 8, 2, 2, 512, return_intermediate_dec=True), 91, 100, aux_loss=True).eval()
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(1.5)  # as they come, random weights hardly attend
    transform = eval_transforms(SHORTER_SIDE_PX, 400)
    images = [transform(picture, {})[0] for picture in four_shapes(shared_data)]
    with torch.inference_mode():
        maps = [model.input_proj(backbone(ImageBatch.of(image[None]))[0][-1].images)[0] for image in images]
        alone = [predict(model, [x], (0, 0)) for x in maps]
        assert (alone[0] - alone[1]).abs().max() > 1e-2, "the images matter"
        for padding in ((0, 0), (3, 1), (0, 9)):
            for image, found in enumerate(predict(model, maps, padding).unbind(1)):
                torch.testing.assert_close(found, alone[image][:, 0], atol=1e-5, rtol=0)


def predict(model: Detr, maps: list[Tensor], padding: tuple[int, int]) -> Tensor:
    """Logits and boxes [L, B, Q, C + 1 + 4] of projected feature maps in a frame with so many more rows and columns."""
    batch = ImageBatch.of(maps)
    rows, columns = padding
    images = torch.nn.functional.pad(batch.images, (0, columns, 0, rows))
    mask = torch.nn.functional.pad(batch.mask, (0, columns, 0, rows), value=True)
    features = ImageBatch(images, mask, batch.sizes)
    outputs = model.outputs(model.transform(images, features, model.backbone[1](features))[0])
    layers = [*outputs["aux_outputs"], outputs]
    return torch.stack([torch.cat([x["pred_logits"], x["pred_boxes"]], -1) for x in layers])


def test_a_maps_sizes_are_its_masks() -> None:
    backbone = build_backbone("tiny", hidden_dim=16)
    sizes = [(int(h), int(w)) for h, w in torch.randint(1, 200, (12, 2))]
    batch = ImageBatch.of([torch.zeros(3, *size) for size in sizes])
    (features,), _ = backbone.eval()(batch)
    assert batch.sizes == tuple(sizes) and features.padded
    for mask, (height, width) in zip(features.mask, features.sizes, strict=True):
        expected = torch.ones_like(mask)
        expected[:height, :width] = False
        assert torch.equal(mask, expected)


def test_sizes_are_rounded_as_the_mask_is() -> None:
    for frame, length in torch.randint(1, 1400, (200, 2)).tolist():
        for cells in (math.ceil(frame / 32), math.ceil(frame / 16)):
            mask = (torch.arange(frame) >= length).float()
            sampled = torch.nn.functional.interpolate(mask[None, None], size=cells)[0, 0]
            assert _valid_cells(length, frame, cells) == int((sampled == 0).sum()), (length, frame, cells)
