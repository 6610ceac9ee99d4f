"""The original DETR's mask head, losses of masks and panoptic post-processing, re-created from their description.

Contestants and nothing else: every query gets a mask, in training too, each with its own copy of the features; the
losses are a chain of operations on maps of the image's size; segments are measured one after the other.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.models.segmentation import MaskHead


def mask_head(head: MaskHead, projected: Tensor, attention: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
    """[B, D, h, w] features and [B, Q, H, h, w] attention to [B, Q, h', w'], layer by layer for all queries at once."""
    batch, queries = attention.shape[:2]

    def for_each_query(x: Tensor) -> Tensor:
        return x[:, None].repeat(1, queries, 1, 1, 1).flatten(0, 1)

    x = torch.cat((for_each_query(projected), attention.flatten(0, 1)), 1)
    x = F.relu(head.gn1(head.lay1(x)))
    x = F.relu(head.gn2(head.lay2(x)))
    adapters = (head.adapter1, head.adapter2, head.adapter3)
    layers, norms = (head.lay3, head.lay4, head.lay5), (head.gn3, head.gn4, head.gn5)
    for adapter, layer, norm, level in zip(adapters, layers, norms, pyramid, strict=True):
        features = for_each_query(adapter(level))
        x = features + F.interpolate(x, size=features.shape[-2:], mode="nearest")
        x = F.relu(norm(layer(x)))
    return head.out_lay(x).view(batch, queries, *x.shape[-2:])


def mask_losses(masks: Tensor, targets: Tensor, num_boxes: int) -> Tensor:
    """[N, h, w] logits and [N, height, width] masks to focal loss + dice loss."""
    x = F.interpolate(masks[:, None], size=targets.shape[-2:], mode="bilinear", align_corners=False)[:, 0].flatten(1)
    t = targets.to(x.dtype).flatten(1)
    p = x.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    focal = (0.25 * t + 0.75 * (1 - t)) * (cross_entropy * (1 - p_t) ** 2)
    p = x.sigmoid()
    dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return focal.mean(1).sum() / num_boxes + dice.sum() / num_boxes


def masks_of_detections(masks: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """[Q, h, w] logits of one image, that fills its batch, to [Q, 1, height, width] uint8."""
    inside = F.interpolate(masks[:, None], size, mode="bilinear", align_corners=False).sigmoid() > 0.5
    return F.interpolate(inside.float(), size=target, mode="nearest").byte()


def panoptic(
    logits: Tensor,
    masks: Tensor,
    is_thing: dict[int, bool],
    size: tuple[int, int],
    target: tuple[int, int],
    threshold: float = 0.85,
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """One image: the ids of a PNG, and (class, area) of each segment."""
    from PIL import Image  # on demand: the mask head's benchmarks do without it

    scores, labels = logits.softmax(-1).max(-1)
    keep = labels.ne(logits.shape[-1] - 1) & (scores > threshold)
    classes = labels[keep]
    maps = F.interpolate(masks[keep][:, None], size, mode="bilinear")[:, 0].flatten(1)
    alike: dict[int, list[int]] = {}
    for number, label in enumerate(classes):
        if not is_thing[label.item()]:
            alike.setdefault(label.item(), []).append(number)
    join = True
    while True:
        ids = maps.transpose(0, 1).softmax(-1).argmax(-1).view(size)
        for numbers in alike.values() if join else ():
            for number in numbers if len(numbers) > 1 else ():
                ids.masked_fill_(ids.eq(number), numbers[0])
        picture = Image.fromarray(colors(ids.cpu().numpy())).resize(target[::-1], Image.Resampling.NEAREST)
        read = np.asarray(picture).astype(np.int64)
        final = torch.from_numpy(read[..., 0] + 256 * read[..., 1] + 65536 * read[..., 2])
        areas = [final.eq(number).sum().item() for number in range(len(maps))]
        small = torch.as_tensor([area <= 4 for area in areas], dtype=torch.bool)
        if not small.any():
            break
        maps, classes, join = maps[~small], classes[~small], False
    picture.save(io.BytesIO(), format="PNG")
    return final.numpy(), list(zip(classes.tolist(), areas, strict=True))


def colors(ids: np.ndarray) -> np.ndarray:
    """[height, width] ids to [height, width, 3] colours."""
    rest, picture = ids.copy(), np.zeros((*ids.shape, 3), dtype=np.uint8)
    for channel in range(3):
        picture[..., channel] = rest % 256
        rest //= 256
    return picture
