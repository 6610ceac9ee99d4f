"""The model's masks in the image's own pixels: of every detection, and as one panoptic segmentation."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.ops import Places, mask_argmax, mask_threshold

Sizes = Sequence[Sequence[int] | Tensor] | Tensor
# The original drops a segment of this many pixels or fewer.
TINY = 4


class PostProcessSegm(nn.Module):
    """A binary mask for every detection.

    Args:
        threshold: the probability above which a pixel belongs to a mask.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self,
        results: Sequence[dict[str, Tensor]],
        outputs: Mapping[str, Any],
        orig_target_sizes: Sizes,
        max_target_sizes: Sizes,
    ) -> list[dict[str, Tensor]]:
        """Add "masks" to what ``PostProcess`` gave.

        Masks are upsampled to the batch's size (bilinear), cut where padding begins, compared, and resized to the
        original size (nearest); computed for the original's pixels alone.

        Args:
            results: a dict for each image.
            outputs: ``pred_masks`` [B, Q, h, w] logits, or the ``QueryMasks`` that computes them.
            orig_target_sizes: B (height, width) of the images before any transform.
            max_target_sizes: B (height, width) of the images as they went into the batch.

        Returns:
            The dicts, each with "masks" [Q, 1, height, width] uint8 on the masks' device.

        Raises:
            ValueError: there are not as many sizes as results.

        It waits for the device where sizes are tensors on it.
        """
        pred_masks = _dense(outputs["pred_masks"])  # [B, Q, h, w]
        batch_sizes, sizes = _pairs(max_target_sizes), _pairs(orig_target_sizes)
        if not len(results) == len(pred_masks) == len(batch_sizes) == len(sizes):
            counts = (len(results), len(pred_masks), len(sizes), len(batch_sizes))
            raise ValueError(f"results, masks and both sizes must be of as many images, got {counts}")
        frame = _largest(batch_sizes)
        bound = math.log(self.threshold / (1 - self.threshold))  # of a logit, whose sigmoid need not be computed
        with_masks = []
        for result, masks, inside, size in zip(results, pred_masks, batch_sizes, sizes, strict=True):
            rows, columns = _places(_nearest, masks.shape[-2:], frame, inside, size)
            with_masks.append({**result, "masks": mask_threshold(masks, rows, columns, bound)[:, None]})
        return with_masks


class Segments(NamedTuple):
    """A panoptic segmentation of one image.

    Attributes:
        ids: [height, width] int64, the segment of each pixel; 0 throughout where there is none.
        segments_info: for each segment "id" (its place in this list, one more where pixels may be of none), "isthing",
            "category_id", and "area" in pixels.
    """

    ids: Tensor
    segments_info: list[dict[str, Any]]

    def png(self) -> bytes:
        """The segments as a PNG whose colours are ids, red + 256 green + 65536 blue. It waits for the device."""
        from PIL import Image  # on demand: training scripts do without it

        rgb = torch.stack((self.ids % 256, self.ids // 256 % 256, self.ids // 65536), -1)
        file = io.BytesIO()
        Image.fromarray(rgb.to(torch.uint8).cpu().numpy()).save(file, format="PNG")
        return file.getvalue()


def things_of_every_class(num_classes: int, is_thing_map: Mapping[int, bool]) -> dict[int, bool]:
    """Class id to whether it is a thing (True) or stuff, of all that a model may find.

    An id that ``is_thing_map`` lacks, such as one between the ids of a data set, is a thing.
    """
    return dict.fromkeys(range(num_classes), True) | dict(is_thing_map)


class PostProcessPanoptic(nn.Module):
    """Every pixel goes to one of the confident queries; queries of the same stuff are one segment.

    Args:
        is_thing_map: class id to whether it is a thing (True) or stuff.
        threshold: queries whose best class is less probable are left out, and those whose best class is "no object".
        void: a pixel whose logits are all below 0 is of no segment, as suits a model that knows no stuff; ids then
            begin with 1. The original has no such pixels.

    Raises:
        ValueError: ``threshold`` is outside [0, 1].
    """

    def __init__(self, is_thing_map: Mapping[int, bool], threshold: float = 0.85, *, void: bool = False) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        self.is_thing_map = {int(number): bool(is_thing) for number, is_thing in is_thing_map.items()}
        self.threshold = threshold
        self.void = void

    def forward(
        self,
        outputs: Mapping[str, Any],
        processed_sizes: Sizes,
        target_sizes: Sizes | None = None,
        *,
        frame: tuple[int, int] | None = None,
    ) -> list[dict[str, Any]]:
        """A segmentation of each image in COCO's panoptic format.

        Args:
            outputs, processed_sizes, target_sizes, frame: as of ``segment``.

        Returns:
            For each image "png_string", the bytes of a PNG (see ``Segments.png``), and "segments_info".

        Raises:
            ValueError: as ``segment``.
        """
        found = self.segment(outputs, processed_sizes, target_sizes, frame=frame)
        return [{"png_string": image.png(), "segments_info": image.segments_info} for image in found]

    @torch.no_grad()
    def segment(
        self,
        outputs: Mapping[str, Any],
        processed_sizes: Sizes,
        target_sizes: Sizes | None = None,
        *,
        frame: tuple[int, int] | None = None,
    ) -> list[Segments]:
        """The segments of each image, as ids.

        A pixel goes to the query with the highest logit there. Queries of the same stuff are joined; segments of at
        most 4 pixels are dropped, and what is left is assigned anew, as long as there are any.

        Args:
            outputs: ``pred_logits`` [B, Q, C + 1] and ``pred_masks`` [B, Q, h, w], or ``QueryMasks``, of which only the
                confident queries' are then computed.
            processed_sizes: B (height, width) of the images as they went into the batch, without padding.
            target_sizes: B (height, width) of the segmentations; None: the processed sizes.
            frame: (height, width) of the padded batch, which the masks cover. None: each image's masks are stretched
                to its processed size, as in the original, which is right for a batch without padding.

        Raises:
            ValueError: there are not as many sizes as images, or a class is not in ``is_thing_map``.

        It waits for the device: what is found decides what is computed.
        """
        logits = outputs["pred_logits"]
        batch_sizes = _pairs(processed_sizes)
        sizes = batch_sizes if target_sizes is None else _pairs(target_sizes)
        if not len(logits) == len(batch_sizes) == len(sizes):
            counts = (len(logits), len(batch_sizes), len(sizes))
            raise ValueError(f"logits, processed_sizes and target_sizes must be of as many images, got {counts}")
        scores, best = logits.softmax(-1).max(-1)  # [B, Q]
        keep = (best != logits.shape[-1] - 1) & (scores > self.threshold)
        kept, classes = keep.nonzero(), best[keep].tolist()
        masks = outputs["pred_masks"][kept[:, 0], kept[:, 1]]  # [kept, h, w]
        counts = keep.sum(1).tolist()
        found = []
        for part, inside, size in zip(masks.split(counts), batch_sizes, sizes, strict=True):
            places = _places(_pillows, masks.shape[-2:], frame or inside, inside, size)
            found.append(self._assign(part, places, classes[: len(part)]))
            classes = classes[len(part) :]
        return found

    def _assign(self, masks: Tensor, places: tuple[Places, Places], classes: list[int]) -> Segments:
        """[K, h, w] logits of K queries and their classes, to segments. It waits for the device."""
        self._check(classes)
        void = int(self.void)
        joined = [classes.index(c) if not self.is_thing_map[c] else k for k, c in enumerate(classes)]
        while classes:
            ids = mask_argmax(F.pad(masks, (0, 0, 0, 0, void, 0)), *places)  # of no segment: a mask of 0 before them
            if joined:
                ids = torch.tensor([0] * void + [k + void for k in joined], device=ids.device)[ids]
            counts = torch.zeros(void + len(classes), dtype=torch.int64, device=ids.device)
            areas = counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids).flatten()).tolist()[void:]
            large = [k for k, area in enumerate(areas) if area > TINY]
            if len(large) == len(classes):
                return Segments(ids, self._infos(classes, areas))
            # Queries of the same stuff have no pixels of their own any more: the first of them speaks for all.
            masks, classes, joined = masks[large], [classes[k] for k in large], []
        size = tuple(len(along.first) for along in places)
        return Segments(masks.new_zeros(size, dtype=torch.int64), [])

    def _infos(self, classes: list[int], areas: list[int]) -> list[dict[str, Any]]:
        return [
            {"id": k + self.void, "isthing": self.is_thing_map[c], "category_id": c, "area": area}
            for k, (c, area) in enumerate(zip(classes, areas, strict=True))
        ]

    def _check(self, classes: list[int]) -> None:
        unknown = sorted(set(classes) - self.is_thing_map.keys())
        if unknown:
            raise ValueError(f"is_thing_map must hold every class that is found, it lacks {unknown}")


def _places(
    chosen: Callable[[int, int], np.ndarray],
    size: Sequence[int],
    frame: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
) -> tuple[Places, Places]:
    """Rows and columns of masks of ``size``, upsampled to ``frame``, cut to ``before``, and resized to ``after``."""
    rows, columns = (Places.of(chosen(before[i], after[i]), size[i], frame[i]) for i in (0, 1))
    return rows, columns


def _nearest(before: int, after: int) -> np.ndarray:
    """Which of ``before`` places each of ``after`` takes in PyTorch's nearest resizing, on the host."""
    return F.interpolate(torch.arange(before, dtype=torch.float32)[None, None], size=after)[0, 0].long().numpy()


def _pillows(before: int, after: int) -> np.ndarray:
    """Which of ``before`` places each of ``after`` takes in Pillow's: at pixel centres, by adding steps up."""
    steps = np.full(after, before / after)
    steps[0] /= 2
    return np.minimum(np.cumsum(steps).astype(np.int64), before - 1)


def _dense(masks: Any) -> Tensor:
    return masks if isinstance(masks, Tensor) else masks.dense()


def _pairs(sizes: Sizes) -> list[tuple[int, int]]:
    """(height, width) pairs on the host; waits for tensors elsewhere."""
    rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    pairs = [row.tolist() if isinstance(row, Tensor) else list(row) for row in rows]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ValueError(f"sizes must be (height, width) pairs of at least one pixel, got {pairs}")
    return [(int(height), int(width)) for height, width in pairs]


def _largest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(height for height, _ in sizes), max(width for _, width in sizes)
