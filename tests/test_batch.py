"""ImageBatch: padding, masks, what it takes and what it refuses."""

from __future__ import annotations

import pytest
import torch

from detr_fast import ImageBatch
from detr_fast.data.batch import collate


def test_images_of_different_sizes_are_padded_bottom_right() -> None:
    images = [torch.rand(3, 4, 6) + 1, torch.rand(3, 5, 2) + 1]
    batch = ImageBatch.of(images)
    assert batch.images.shape == (2, 3, 5, 6) and len(batch) == 2
    for image, padded, mask in zip(images, batch.images, batch.mask, strict=True):
        h, w = image.shape[1:]
        assert torch.equal(padded[:, :h, :w], image)
        assert not mask[:h, :w].any() and mask.sum() == 30 - h * w
        assert padded[:, mask].eq(0).all()
    assert batch.tensors is batch.images and batch.decompose() == (batch.images, batch.mask)
    assert batch.to("cpu").mask.equal(batch.mask)


def test_collate_keeps_targets_beside_their_images() -> None:
    batch, targets = collate([(torch.rand(3, 4, 4), {"labels": torch.tensor([i])}) for i in range(3)])
    assert len(batch) == 3
    assert [target["labels"].item() for target in targets] == [0, 1, 2]


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([], ValueError, "at least one image, got an empty list"),
        ([torch.zeros(3, 4, 4), torch.zeros(4, 4)], ValueError, r"image 1 must be \[3, height, width\], got \[4, 4\]"),
        ([torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)], ValueError, r"image 1 must be \[3, height, width\]"),
        ([torch.zeros(3, 0, 4)], ValueError, r"image 0 must be"),
        (torch.zeros(3, 4, 4), ValueError, r"\[B, channels, height, width\], got \[3, 4, 4\]"),
        (torch.zeros(0, 3, 4, 4), ValueError, "at least one image"),
        ("photo.jpg", TypeError, "got str"),
        (7, TypeError, "got int"),
    ],
)
def test_refuses_what_is_not_a_batch(samples, error, message) -> None:
    with pytest.raises(error, match=message):
        ImageBatch.of(samples)


def test_refuses_a_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"mask must be bool \[2, 4, 5\], got torch.bool \[2, 5, 4\]"):
        ImageBatch(torch.zeros(2, 3, 4, 5), torch.zeros(2, 5, 4, dtype=torch.bool))


def test_the_host_knows_the_sizes() -> None:
    batch = ImageBatch.of([torch.zeros(3, 4, 6), torch.zeros(3, 5, 2)])
    assert batch.sizes == ((4, 6), (5, 2)) and batch.padded
    assert batch.to("cpu").sizes == batch.sizes and batch.to("cpu").padded
    assert not ImageBatch.of([torch.zeros(3, 4, 6)] * 2).padded
    assert ImageBatch.of(torch.zeros(2, 3, 4, 6)).padded is False
    assert ImageBatch.of(torch.zeros(2, 3, 4, 6)).to("cpu").padded is False
    unknown = ImageBatch(batch.images, batch.mask)
    assert unknown.sizes is None and unknown.padded is None
    for sizes in (((4, 6),), ((4, 6), (5, 7)), ((4, 6), (-1, 2))):
        with pytest.raises(ValueError, match="sizes must be 2 sizes of at most 5 x 6, got"):
            ImageBatch(batch.images, batch.mask, sizes)
