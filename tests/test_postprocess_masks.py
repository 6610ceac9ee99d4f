"""Masks at the image's size and panoptic segmentations, against the original's steps taken one by one."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from detr_fast import PostProcessPanoptic, PostProcessSegm
from detr_fast.postprocess_masks import _pillows

THINGS = {0: True, 1: True, 2: False, 3: False, 4: False}


def random_masks(batch: int, queries: int = 12, classes: int = 5, size: tuple[int, int] = (13, 17)) -> dict:
    """Blobs, half of them with a confident class."""
    logits = torch.randn(batch, queries, classes + 1)
    best = torch.randint(classes + 1, (batch, queries, 1))
    logits.scatter_(2, best, 9 * torch.rand(batch, queries, 1))
    blobs = F.interpolate(torch.randn(batch, queries, 4, 4), size, mode="bicubic")
    return {"pred_logits": logits, "pred_masks": 4 * blobs, "pred_boxes": torch.rand(batch, queries, 4)}


def step_by_step(logits: Tensor, masks: Tensor, size: tuple, target: tuple, threshold: float) -> tuple:
    """One image: a picture of ids and the (class, area) of each segment, with nothing done ahead or at once.

    Also whether rounding may decide a pixel: two logits of which the higher is barely so.
    """
    probability, label = logits.softmax(-1).max(-1)
    keep = [q for q in range(len(logits)) if label[q] != logits.shape[-1] - 1 and probability[q] > threshold]
    classes = [int(label[q]) for q in keep]
    maps = [F.interpolate(masks[q][None, None], size, mode="bilinear")[0, 0] for q in keep]
    merge, close = True, False
    while True:
        if len(maps) > 1:
            best, second = torch.stack(maps).topk(2, 0).values
            close |= bool((best - second < 1e-5).any())
        ids = torch.stack(maps).softmax(0).argmax(0) if maps else torch.zeros(size, dtype=torch.int64)
        for later in range(len(maps)) if merge else ():
            same = [k for k in range(later) if classes[k] == classes[later] and not THINGS[classes[k]]]
            if same:
                ids[ids == later] = same[0]
        picture = np.asarray(
            Image.fromarray(ids.numpy().astype(np.int32)).resize(target[::-1], Image.Resampling.NEAREST)
        )
        areas = [int((picture == k).sum()) for k in range(len(maps))]
        if all(area > 4 for area in areas):
            return picture, list(zip(classes, areas, strict=True)), close
        maps = [m for m, area in zip(maps, areas, strict=True) if area > 4]
        classes = [c for c, area in zip(classes, areas, strict=True) if area > 4]
        merge = False


def read_png(data: bytes) -> np.ndarray:
    red, green, blue = np.moveaxis(np.asarray(Image.open(io.BytesIO(data))).astype(int), -1, 0)
    return red + 256 * green + 65536 * blue


@pytest.mark.parametrize("threshold", [0.3, 0.85])
def test_segments_are_those_of_the_original(threshold: float) -> None:
    postprocess = PostProcessPanoptic(THINGS, threshold)
    found = dropped = joined = 0
    for _ in range(25):
        outputs = random_masks(2)
        sizes, targets = [[tuple(np.random.randint(low, 90, 2).tolist()) for _ in range(2)] for low in (12, 3)]
        results = postprocess(outputs, sizes, torch.tensor(targets))
        for i, result in enumerate(results):
            logits, masks = outputs["pred_logits"][i], outputs["pred_masks"][i]
            picture, segments, close = step_by_step(logits, masks, sizes[i], targets[i], threshold)
            if close:
                continue
            np.testing.assert_array_equal(read_png(result["png_string"]), picture)
            assert result["segments_info"] == [
                {"id": k, "isthing": THINGS[c], "category_id": c, "area": a} for k, (c, a) in enumerate(segments)
            ]
            probability, label = logits.softmax(-1).max(-1)
            kept = label[(label != 5) & (probability > threshold)].tolist()
            found += len(segments)
            joined += sum(kept.count(c) > 1 for c in (2, 3, 4))
            dropped += len(kept) > len(segments)
    assert found > 50 and joined > 5 and dropped > 5


@pytest.mark.parametrize("before", [1, 2, 3, 4, 7, 480, 799, 1066])
def test_resizing_is_pillows(before: int) -> None:
    for after in (1, 2, 3, 6, 9, 427, 640, 1066, 1333):
        picture = Image.fromarray(np.arange(before, dtype=np.int32)[None])
        expected = np.asarray(picture.resize((after, 1), Image.Resampling.NEAREST))[0]
        np.testing.assert_array_equal(_pillows(before, after), expected)


def test_masks_of_detections_are_the_originals() -> None:
    outputs = random_masks(2, queries=20)
    inside, original = torch.tensor([[52, 40], [37, 68]]), torch.tensor([[101, 77], [9, 16]])
    results = PostProcessSegm()([{"scores": torch.ones(20)}, {"scores": torch.zeros(20)}], outputs, original, inside)
    frame = F.interpolate(outputs["pred_masks"], (52, 68), mode="bilinear").sigmoid() > 0.5
    for i, result in enumerate(results):
        (height, width), size = inside[i].tolist(), original[i].tolist()
        expected = F.interpolate(frame[i][:, None, :height, :width].float(), size, mode="nearest")
        assert result["masks"].dtype == torch.uint8 and torch.equal(result["masks"].float(), expected)
        assert 0.2 < expected.mean() < 0.8 and float(result["scores"][0]) == 1 - i


def test_the_padded_part_of_a_batch_is_cut_off_where_its_frame_is_given() -> None:
    masks = torch.full((2, 1, 8, 8), -9.0)
    logits = torch.tensor([9.0, 0, 0, 0, 0, 0]).expand(2, 1, 6)
    outputs = {"pred_logits": logits.repeat(1, 2, 1), "pred_masks": torch.cat((masks, masks), 1)}
    outputs["pred_masks"][1, 0, :, :4] = 9  # the left half of the frame, all of image 1
    outputs["pred_masks"][1, 1, :, 4:] = 9  # its padding
    segments = PostProcessPanoptic(THINGS).segment(outputs, [(32, 32), (32, 16)], frame=(32, 32))[1]
    assert [info["area"] for info in segments.segments_info] == [32 * 16]
    stretched = PostProcessPanoptic(THINGS).segment(outputs, [(32, 32), (32, 16)])[1]
    assert [info["area"] for info in stretched.segments_info] == [32 * 8, 32 * 8]


def test_pixels_of_no_segment_where_a_model_knows_no_stuff() -> None:
    outputs = {"pred_logits": torch.zeros(1, 3, 6), "pred_masks": torch.full((1, 3, 8, 8), -2.0)}
    outputs["pred_logits"][:, :, 0] = 20
    outputs["pred_masks"][0, 0, :4] = 5
    outputs["pred_masks"][0, 2, 4:, 4:] = 5
    (found,) = PostProcessPanoptic(THINGS, void=True).segment(outputs, [(8, 8)])
    assert [(info["id"], info["area"]) for info in found.segments_info] == [(1, 32), (2, 16)]
    assert found.ids[:4].eq(1).all() and found.ids[4:, 4:].eq(2).all() and found.ids[4:, :4].eq(0).all()
    (covered,) = PostProcessPanoptic(THINGS).segment(outputs, [(8, 8)])
    assert [info["area"] for info in covered.segments_info] == [48, 16]


def test_nothing_found_and_a_segment_of_five_pixels() -> None:
    outputs = random_masks(1)
    outputs["pred_logits"][:] = 0
    (empty,) = PostProcessPanoptic(THINGS)(outputs, [(20, 30)])
    assert empty["segments_info"] == [] and read_png(empty["png_string"]).tolist() == np.zeros((20, 30)).tolist()
    outputs = {"pred_logits": torch.zeros(1, 2, 6), "pred_masks": torch.zeros(1, 2, 5, 5)}
    outputs["pred_logits"][:, :, 0] = 20
    outputs["pred_masks"][0, 1, 0] = 1  # five pixels
    postprocess = PostProcessPanoptic(THINGS)
    assert [info["area"] for info in postprocess(outputs, [(5, 5)])[0]["segments_info"]] == [20, 5]
    outputs["pred_masks"][0, 1, 0, 0] = -1  # four
    assert [info["area"] for info in postprocess(outputs, [(5, 5)])[0]["segments_info"]] == [25]


def test_bad_input_is_refused() -> None:
    outputs = random_masks(2)
    outputs["pred_logits"][0, 0] = torch.tensor([0, 0, 0, 0, 30.0, 0])
    with pytest.raises(ValueError, match=r"it lacks \[4\]"):
        PostProcessPanoptic(dict.fromkeys(range(4), True))(outputs, [(5, 5), (5, 5)])
    with pytest.raises(ValueError, match=r"of as many images, got \(2, 1, 1\)"):
        PostProcessPanoptic(THINGS)(outputs, [(5, 5)])
    with pytest.raises(ValueError, match=r"of as many images, got \(1, 2, 2, 2\)"):
        PostProcessSegm()([{}], outputs, [(5, 5)] * 2, [(5, 5)] * 2)
    with pytest.raises(ValueError, match=r"at least one pixel, got \[\[0, 5\], \[5, 5\]\]"):
        PostProcessSegm()([{}, {}], outputs, [(0, 5), (5, 5)], [(5, 5)] * 2)
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, got 1"):
        PostProcessSegm(1)
