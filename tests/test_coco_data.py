"""Reading COCO-format data: targets as the original's, and annotation errors that name file, entry and key."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as pycocotools_mask
from torch.utils.data import DataLoader

from detr_fast.data.annotations import AnnotationError, read_annotations
from detr_fast.data.coco import CocoDetection, decode_segmentation, seed_worker
from detr_fast.data.images import ImageError
from detr_fast.data.transforms import eval_transforms, train_transforms

SQUARE = [[2, 2, 6, 2, 6, 6, 2, 6]]


def small_coco() -> dict[str, Any]:
    """Two images of 20 x 10, the first with two objects, a crowd and a box of no width; ids with gaps."""
    boxes = [[2.0, 2.0, 4.0, 4.0], [15.0, -2.0, 10.0, 6.0], [0.0, 0.0, 9.0, 9.0], [3.0, 3.0, 0.0, 5.0]]
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "width": 20, "height": 10},
            {"id": 3, "file_name": "a.png", "width": 20, "height": 10},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": 9 if i else 4, "bbox": box, "area": box[2] * box[3] / 2}
            | {"iscrowd": int(i == 2), "segmentation": SQUARE}
            for i, box in enumerate(boxes)
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / name)
    return tmp_path


def test_target_has_the_originals_fields(folder: Path) -> None:
    dataset = CocoDetection(folder, small_coco())
    assert dataset.image_ids == [3, 7]
    assert len(dataset) == 2
    image, target = dataset[1]
    assert image.getpixel((0, 0)) == (0, 0, 255)
    # The crowd and the box without width are gone, the second box is clipped to the image.
    assert target["boxes"].tolist() == [[2, 2, 6, 6], [15, 0, 20, 4]]
    assert target["labels"].tolist() == [4, 9]
    assert target["area"].tolist() == [8, 30]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["image_id"].tolist() == [7]
    assert target["orig_size"].tolist() == target["size"].tolist() == [10, 20]
    types = {key: value.dtype for key, value in target.items()}
    floats, integers = ("boxes", "area"), ("labels", "iscrowd", "image_id", "orig_size", "size")
    assert types == dict.fromkeys(floats, torch.float32) | dict.fromkeys(integers, torch.int64)


def test_image_without_objects_stays_in(folder: Path) -> None:
    _, target = CocoDetection(folder, small_coco(), return_masks=True)[0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == target["area"].shape == (0,)
    assert target["masks"].shape == (0, 10, 20)


def test_category_ids_keep_their_gaps(folder: Path) -> None:
    dataset = CocoDetection(folder, small_coco())
    assert dataset.categories == {4: "cat", 9: "dog"}
    assert dataset.num_classes == 10


def test_area_is_the_boxs_where_it_is_absent(folder: Path) -> None:
    contents = small_coco()
    for annotation in contents["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    assert CocoDetection(folder, contents)[1][1]["area"].tolist() == [16, 60, 81]


def test_file_equals_its_contents(folder: Path) -> None:
    (folder / "annotations.json").write_text(json.dumps(small_coco()))
    dataset = CocoDetection(folder, folder / "annotations.json")
    assert dataset.annotation_file == folder / "annotations.json"
    assert dataset[1][1]["boxes"].tolist() == CocoDetection(folder, small_coco())[1][1]["boxes"].tolist()


def test_masks_follow_their_boxes(folder: Path) -> None:
    contents = small_coco()
    contents["annotations"][1]["segmentation"] = {"size": [10, 20], "counts": [150, 4, 46]}
    _, target = CocoDetection(folder, contents, return_masks=True)[1]
    assert target["masks"].dtype == torch.bool
    assert target["masks"].shape == (2, 10, 20)
    assert target["masks"][0].nonzero().tolist() == [[y, x] for y in range(2, 6) for x in range(2, 6)]
    assert target["masks"][1].nonzero().tolist() == [[y, 15] for y in range(4)]


def test_sideways_photo_takes_the_annotated_orientation(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(folder / "b.png", exif=exif)
    contents = small_coco()
    assert CocoDetection(folder, contents)[1][0].size == (20, 10)
    contents["images"][0].update(width=10, height=20)
    assert CocoDetection(folder, contents)[1][0].size == (10, 20)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own use of numpy
def test_polygons_and_run_lengths_equal_pycocotools() -> None:
    height, width = 37, 53
    polygons = [(np.random.rand(2 * n) * 50).tolist() for n in (3, 7)]
    expected = pycocotools_mask.merge(pycocotools_mask.frPyObjects(polygons, height, width))
    mask = pycocotools_mask.decode(expected).astype(bool)
    assert mask.any()
    compressed = {"size": [height, width], "counts": expected["counts"].decode()}
    flat = np.concatenate(([False], mask.flatten(order="F"), [False]))
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate(([0], edges, [mask.size]))).tolist()
    for segmentation in (polygons, compressed, {"size": [height, width], "counts": counts}):
        assert np.array_equal(decode_segmentation(segmentation, width, height), mask)


def test_polygon_of_two_points_is_empty() -> None:
    assert not decode_segmentation([[1, 1, 5, 5]], 10, 10).any()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [20, 10], "counts": [200]}, r"'size' must be \[10, 20\]"),
        ({"size": [10, 20], "counts": [100]}, "must sum to the number of pixels"),
        ({"size": [10, 20], "counts": "zz!!"}, "invalid RLE"),
        ({"size": [10, 20]}, "counts"),
        ([[1, 2, 3, 4, 5]], "a polygon must be finite numbers"),
        ([[1, 2, 3, 4, 5, math.nan]], "a polygon must be finite numbers"),
        (["abc"], "could not convert"),
        ("abc", "expected a list of polygons"),
        ([], "masks need the key 'segmentation'"),
        (None, "masks need the key 'segmentation'"),
    ],
)
def test_bad_segmentation_is_named(folder: Path, segmentation: Any, message: str) -> None:
    contents = small_coco()
    contents["annotations"][1]["segmentation"] = segmentation
    with pytest.raises(AnnotationError, match=rf"annotations\[1\] \(id 1\): .*{message}"):
        CocoDetection(folder, contents, return_masks=True)[1]


def change(contents: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    *parents, last = path
    for key in parents:
        contents = contents[key]
    if value is KeyError:
        del contents[last]
    else:
        contents[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("images",), KeyError, "the key 'images' is missing"),
        (("annotations",), KeyError, "the key 'annotations' is missing"),
        (("categories",), KeyError, "the key 'categories' is missing"),
        (("annotations",), {}, "'annotations' must be a list, got dict"),
        (("images",), [], "'images' is empty"),
        (("images", 1, "id"), KeyError, r"images\[1\]: the key 'id' is missing"),
        (("images", 1, "id"), "x", r"images\[1\] \(id 'x'\): 'id' must be an integer"),
        (("images", 0, "file_name"), KeyError, r"images\[0\] \(id 7\): the key 'file_name' is missing"),
        (("images", 0, "file_name"), 5, r"images\[0\] \(id 7\): 'file_name' must be a string, got 5"),
        (("images", 1, "id"), 7, "images: 'id' 7 stands 2 times"),
        (("images", 1), None, r"images\[1\]: must be an object, got NoneType"),
        (("categories", 1, "id"), 9, "categories: 'id' 9 stands 2 times"),
        (("categories", 1, "id"), -1, r"categories\[1\] \(id -1\): 'id' must be at least 0"),
        (("annotations", 1, "bbox"), KeyError, r"annotations\[1\] \(id 1\): the key 'bbox' is missing"),
        (("annotations", 1, "image_id"), KeyError, r"annotations\[1\] \(id 1\): the key 'image_id' is missing"),
        (("annotations", 1, "category_id"), KeyError, r"annotations\[1\] \(id 1\): the key 'category_id' is missing"),
        (("annotations", 1, "image_id"), 8, r"annotations\[1\] \(id 1\): 'image_id' 8 is no id in 'images'"),
        (("annotations", 1, "category_id"), 5, r"annotations\[1\] \(id 1\): 'category_id' 5 is no id in 'categories'"),
        (("annotations", 1, "bbox"), [1, 2, 3], r"annotations\[1\] \(id 1\): 'bbox' must be 4 numbers"),
        (("annotations", 1, "bbox"), None, r"annotations\[1\] \(id 1\): 'bbox' must be 4 numbers"),
        (("annotations", 1, "bbox"), "abcd", r"annotations\[1\] \(id 1\): 'bbox' must be 4 numbers"),
        (("annotations", 1, "bbox", 2), math.nan, r"annotations\[1\] \(id 1\): 'bbox' must be finite numbers"),
        (("annotations", 1, "bbox", 0), math.inf, r"annotations\[1\] \(id 1\): 'bbox' must be finite numbers"),
        (("annotations", 1, "bbox", 0), "1", r"annotations\[1\] \(id 1\): 'bbox' must be finite numbers"),
        (("annotations", 1, "bbox", 3), -1.0, r"annotations\[1\] \(id 1\): 'bbox' .* must not have a negative size"),
        (("annotations", 1, "area"), math.nan, r"annotations\[1\] \(id 1\): 'area' must be a finite number"),
        (("annotations", 1, "area"), None, r"annotations\[1\] \(id 1\): 'area' must be a finite number"),
        (("annotations", 1, "iscrowd"), "no", r"annotations\[1\] \(id 1\): 'iscrowd' must be 0 or 1"),
        (("annotations", 1), 5, r"annotations\[1\]: must be an object, got int"),
    ],
)
def test_unusable_annotations_are_named(tmp_path: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    contents = small_coco()
    change(contents, path, value)
    (tmp_path / "broken.json").write_text(json.dumps(contents))
    with pytest.raises(AnnotationError, match=r"broken\.json: .*" + message):
        CocoDetection(tmp_path, tmp_path / "broken.json")


def test_further_faults_are_counted() -> None:
    contents = small_coco()
    for annotation in contents["annotations"]:
        annotation["bbox"] = [1]
    with pytest.raises(AnnotationError, match=r"annotations\[0\].*and 3 more"):
        read_annotations(contents)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "expected an object, got list")])
def test_file_that_is_no_annotation_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(AnnotationError, match=rf"odd\.json.*{message}"):
        read_annotations(tmp_path / "odd.json")


def test_missing_annotation_file(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"absent\.json cannot be opened: No such file"):
        read_annotations(tmp_path / "absent.json")


def test_contents_are_not_changed(folder: Path) -> None:
    contents = small_coco()
    before = copy.deepcopy(contents)
    dataset = CocoDetection(folder, contents, train_transforms([16], 32, crop_scales=[12], crop_range=(6, 10)))
    first = [dataset.target(i, (20, 10)) for i in range(2)]
    for _ in range(5):
        dataset[1]
    assert contents == before
    assert first[1]["boxes"].equal(dataset.target(1, (20, 10))["boxes"])


def test_missing_image_is_named(folder: Path) -> None:
    (folder / "b.png").unlink()
    with pytest.raises(ImageError, match=r"b\.png does not exist"):
        CocoDetection(folder, small_coco())[1]


def test_missing_image_is_named_from_a_worker(folder: Path) -> None:
    (folder / "b.png").unlink()
    loader = DataLoader(CocoDetection(folder, small_coco()), num_workers=1, collate_fn=list, batch_size=2)
    with pytest.raises(ImageError, match=r"b\.png does not exist"):
        list(loader)


class Draws(torch.utils.data.Dataset[tuple[float, float]]):
    """What python's and numpy's generators give in a worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[float, float]:
        return random.random(), float(np.random.rand())


def test_workers_draw_different_and_repeatable_numbers() -> None:
    def draw(seed: int) -> list[tuple[float, ...]]:
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(Draws(), batch_size=None, num_workers=2, worker_init_fn=seed_worker, generator=generator)
        return [tuple(float(value) for value in pair) for pair in loader]

    first = draw(1)
    assert len({value for pair in first for value in pair}) == 8
    assert first == draw(1)
    assert first != draw(2)


def check_dataset_loads(dataset: CocoDetection) -> int:
    objects = 0
    for image, target in dataset:
        height, width = target["size"].tolist()
        assert image.shape == (3, height, width)
        assert image.isfinite().all()
        boxes = target["boxes"]
        assert len(boxes) == len(target["labels"]) == len(target["area"]) == len(target["iscrowd"])
        assert (boxes[:, 2:] > 0).all()
        assert (boxes[:, :2] - boxes[:, 2:] / 2 >= -1e-5).all()
        assert (boxes[:, :2] + boxes[:, 2:] / 2 <= 1 + 1e-5).all()
        objects += len(boxes)
    return objects


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco_images_all_load(shared_data: Path, split: str) -> None:
    root = shared_data / "coco200"
    annotation_file = root / "annotations" / f"instances_{split}.json"
    dataset = CocoDetection(root / "images" / split, annotation_file, eval_transforms(200, 333))
    contents = json.loads(annotation_file.read_text())
    assert len(dataset) == 100
    assert dataset.num_classes == 91
    assert check_dataset_loads(dataset) == sum(not entry["iscrowd"] for entry in contents["annotations"])


def test_real_blood_cells_all_load_without_the_empty_boxes(bccd: tuple[Path, Path]) -> None:
    images, annotation_file = bccd
    dataset = CocoDetection(images, annotation_file, eval_transforms(120, 200))
    total = len(json.loads(annotation_file.read_text())["annotations"])
    assert len(dataset) == 364
    assert sorted(dataset.categories.values()) == ["Platelets", "RBC", "WBC"]
    assert check_dataset_loads(dataset) == total - 2


def test_paper_augmentation_on_real_images(shared_data: Path) -> None:
    root = shared_data / "coco200"
    annotation_file = root / "annotations" / "instances_train2017.json"
    dataset = CocoDetection(root / "images" / "train2017", annotation_file, train_transforms())
    for index in random.sample(range(len(dataset)), 6):
        image, target = dataset[index]
        assert min(image.shape[1:]) <= 800
        assert max(image.shape[1:]) <= 1333
        assert list(image.shape[1:]) == target["size"].tolist()
        assert ((target["boxes"] >= 0) & (target["boxes"] <= 1 + 1e-6)).all()  # a float32 division may round up
