"""COCO's panoptic format: real files against their own numbers, and what is wrong in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data.annotations import AnnotationError
from detr_fast.data.coco_panoptic import CocoPanoptic, boxes_of_masks, read_panoptic, read_segment_ids
from detr_fast.data.images import ImageError
from detr_fast.data.transforms import eval_transforms, train_transforms

# A thing of 700 = 188 + 2 * 256, one of one pixel, and stuff of 66000 = 208 + 1 * 256 + 1 * 65536.
IDS = {"cat": 700, "dot": 3, "sky": 66000}


def contents() -> dict:
    segments = [
        {"id": IDS["cat"], "category_id": 1},
        {"id": IDS["dot"], "category_id": 1, "iscrowd": 1},
        {"id": IDS["sky"], "category_id": 9},
    ]
    return {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 5, "file_name": "a.jpg", "width": 6, "height": 4}],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0}],
        "annotations": [
            {"image_id": 7, "file_name": "b.png", "segments_info": []},
            {"image_id": 5, "file_name": "a.png", "segments_info": segments},
        ],
    }


def write_ids(path: Path, ids: np.ndarray) -> None:
    Image.fromarray(np.stack((ids % 256, ids // 256 % 256, ids // 65536), -1).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ids = np.zeros((4, 6), dtype=np.int64)
    ids[:2] = IDS["sky"]
    ids[1:3, 2:5] = IDS["cat"]
    ids[3, 5] = IDS["dot"]
    for name, picture in (("a", ids), ("b", np.zeros((3, 5), dtype=np.int64))):
        write_ids(tmp_path / f"{name}.png", picture)
        Image.new("RGB", picture.shape[::-1]).save(tmp_path / f"{name}.jpg")
    return tmp_path


def dataset(folder: Path, entries: dict | None = None, **options) -> CocoPanoptic:
    return CocoPanoptic(folder, folder, contents() if entries is None else entries, **options)


def test_things_stuff_and_ids_over_255(folder: Path) -> None:
    data = dataset(folder)
    assert data.image_ids == [5, 7] and data.num_classes == 10
    assert data.is_thing_map == {1: True, 9: False} and data.categories == {1: "cat", 9: "sky"}
    image, target = data[0]
    assert image.size == (6, 4) and target["image_id"].tolist() == [5]
    assert target["labels"].tolist() == [1, 1, 9] and target["iscrowd"].tolist() == [0, 1, 0]
    assert target["boxes"].tolist() == [[2, 1, 5, 3], [5, 3, 6, 4], [0, 0, 6, 2]]
    assert target["area"].tolist() == [6, 1, 9]
    assert target["masks"].dtype == torch.bool and target["masks"].sum(0).max() == 1
    assert target["masks"][2, :2].tolist() == [[True] * 6, [True, True, False, False, False, True]]
    assert "masks" not in dataset(folder, return_masks=False)[0][1]


def test_an_empty_image(folder: Path) -> None:
    _, target = dataset(folder, transforms=eval_transforms(10, 20))[1]
    assert target["masks"].shape[0] == 0 and target["boxes"].shape == (0, 4) and target["labels"].dtype == torch.int64


def test_an_image_with_only_stuff_and_augmentation(folder: Path) -> None:
    entries = contents()
    entries["annotations"][1]["segments_info"] = [{"id": IDS["sky"], "category_id": 9}]
    write_ids(folder / "a.png", np.full((4, 6), IDS["sky"]))
    augmented = train_transforms((32,), 64, crop_scales=(40,), crop_range=(16, 24))
    for _ in range(5):
        image, target = dataset(folder, entries, transforms=augmented)[0]
        assert target["labels"].tolist() == [9] and target["masks"].shape == (1, *image.shape[1:])
        assert target["masks"].all()
        torch.testing.assert_close(target["boxes"], torch.tensor([[0.5, 0.5, 1, 1]]))


def test_boxes_hold_their_masks() -> None:
    masks = torch.zeros(20, 9, 13, dtype=torch.bool)
    for mask in masks:
        y, x = np.random.randint(0, 9, 4), np.random.randint(0, 13, 4)
        mask[y, x] = True
    for mask, box in zip(masks, boxes_of_masks(masks.numpy()), strict=True):
        y, x = mask.nonzero().unbind(1)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_pngs_that_do_not_fit_are_refused(folder: Path) -> None:
    write_ids(folder / "b.png", np.zeros((3, 4), dtype=np.int64))
    with pytest.raises(AnnotationError, match=r"b.png is 4 x 3 pixels, its image 5 x 3"):
        dataset(folder)[1]
    entries = contents()
    entries["annotations"][1]["segments_info"].append({"id": 44, "category_id": 1})
    with pytest.raises(AnnotationError, match=r"a.png has no pixel of segment 44, which its 'segments_info' lists"):
        dataset(folder, entries)[0]
    del entries["annotations"][1]["segments_info"][2:]
    with pytest.raises(AnnotationError, match=r"a.png has pixels of segment 66000, which its 'segments_info' lacks"):
        dataset(folder, entries)[0]
    Image.new("L", (6, 4)).save(folder / "a.png")
    with pytest.raises(AnnotationError, match=r"a.png must be an RGB picture.* got mode 'L'"):
        dataset(folder)[0]
    (folder / "a.png").write_bytes((folder / "b.png").read_bytes()[:40])
    with pytest.raises(ImageError, match=r"segments .*a.png cannot be read"):
        dataset(folder)[0]
    (folder / "a.png").unlink()
    with pytest.raises(ImageError, match=r"segments .*a.png do not exist"):
        dataset(folder)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), "the list 'annotations' is missing"),
        (lambda c: c["categories"][0].pop("isthing"), r"categories\[0\] \(id 1\): the key 'isthing' is missing"),
        (lambda c: c["annotations"].pop(0), "image 7 has no annotation"),
        (lambda c: c["images"].clear(), "'images' is empty"),
        (lambda c: c["images"].append(c["images"][0]), r"images\[2\] \(id 7\): 'id' 7 stands there already"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "'image_id' 7 stands there already"),
        (lambda c: c["annotations"][1]["segments_info"][0].update(category_id=3), "'category_id' 3 is no id in 'categ"),
        (lambda c: c["annotations"][1]["segments_info"][0].update(id=0), "different numbers from 1 to 16777215, got 0"),
        (lambda c: c["annotations"][1]["segments_info"][0].update(id=3), "different numbers from 1 to 16777215, got 3"),
        (lambda c: c["annotations"][1]["segments_info"][2].pop("id"), "segment 2 must have 'id' and 'category_id'"),
    ],
)
def test_a_broken_file_says_what_is_wrong(change, message: str) -> None:
    entries = contents()
    change(entries)
    with pytest.raises(AnnotationError, match=message):
        read_panoptic(entries)


def test_real_files_have_the_areas_and_boxes_that_they_say(shared_data: Path) -> None:
    folder = shared_data / "coco200" / "annotations"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    segments = 0
    for split in ("val2017", "train2017"):
        entries = read_panoptic(folder / f"panoptic_{split}.json")
        data = CocoPanoptic(folder.parent / "images" / split, folder / f"panoptic_{split}", entries)
        for image, image_id in enumerate(data.image_ids):
            annotation = data.annotations[image_id]
            height, width = read_segment_ids(data.annotation_folder / annotation["file_name"]).shape
            target = data.target(image, (width, height))
            infos = annotation["segments_info"]
            assert target["area"].tolist() == [info["area"] for info in infos]
            boxes = torch.tensor([info["bbox"] for info in infos], dtype=torch.float32)
            torch.testing.assert_close(target["boxes"][:, 2:] - target["boxes"][:, :2], boxes[:, 2:])
            assert torch.equal(target["boxes"][:, :2], boxes[:, :2])
            segments += len(infos)
    assert segments > 2000


def test_a_real_image_goes_through_the_transforms(shared_data: Path) -> None:
    folder = shared_data / "coco200" / "annotations"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    images = folder.parent / "images" / "val2017"
    data = CocoPanoptic(images, folder / "panoptic_val2017", folder / "panoptic_val2017.json", train_transforms((256,)))
    image, target = data[3]
    assert target["masks"].shape == (len(target["labels"]), *image.shape[1:])
    assert 0.3 < target["masks"].sum(0).float().mean() <= 1
