"""check-data: every kind of mistake is found, counted and shown where it is, and sound data is passed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_fast.data.annotations import AnnotationError
from detr_fast.data.check import check_dataset
from detr_fast.data.coco import CocoDetection
from detr_fast.data.report import DatasetReport


def sound_coco() -> dict[str, Any]:
    """Three images of 60 x 40: ten objects and a crowd, one object, none."""
    images = [{"id": number, "file_name": f"{number}.png", "width": 60, "height": 40} for number in (2, 5, 6)]
    box = {"image_id": 2, "category_id": 1, "iscrowd": 0}
    annotations = [box | {"id": i, "bbox": [20.0 + i, 10.0 + i, 12.0, 6.0], "area": 72.0} for i in range(10)]
    annotations.append(box | {"id": 10, "bbox": [0, 0, 50, 39], "iscrowd": 1})
    annotations.append(box | {"id": 11, "bbox": [30, 20, 20, 8], "image_id": 5, "category_id": 4})
    categories = [{"id": number, "name": name} for number, name in ((1, "cat"), (4, "dog"), (5, "cow"))]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (2, 5, 6):
        Image.fromarray(np.random.randint(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


def found(report: DatasetReport, kind: str) -> tuple[int, str]:
    """Count and first example of the only finding of a kind."""
    (finding,) = [finding for finding in (*report.problems, *report.warnings) if finding.kind == kind]
    return finding.count, finding.examples[0]


def test_sound_data_passes(folder: Path) -> None:
    report = check_dataset(folder, sound_coco(), num_queries=10)
    assert report.ok
    assert report.problems == report.warnings == []
    assert (report.num_images, report.num_empty_images, report.num_images_over_queries) == (3, 1, 0)
    assert (report.num_annotations, report.num_objects, report.num_crowd) == (12, 11, 1)
    assert report.category_names == {1: "cat", 4: "dog", 5: "cow"}
    assert report.category_id_gaps == [2, 3]
    assert report.class_counts == {1: 10, 4: 1, 5: 0}
    assert report.objects_per_image.maximum == 10
    assert report.objects_per_image.median == 1
    assert (report.image_widths.minimum, report.image_heights.maximum) == (60, 40)
    assert report.box_scales == {"small": 11, "medium": 0, "large": 0}


def test_text_and_json(folder: Path) -> None:
    contents = sound_coco()
    contents["annotations"][0]["bbox"][2] = 0
    (folder / "annotations.json").write_text(json.dumps(contents))
    report = check_dataset(folder, folder / "annotations.json", num_queries=3)
    text = report.render()
    assert "annotations.json with images in" in text
    assert "3 images, 1 without objects" in text
    assert "10 objects and 1 crowd regions in 12 annotations" in text
    assert "3 classes, 2 unused ids between them" in text
    assert "1 images have more than the 3 queries" in text
    assert "1 boxes have no area and are dropped" in text
    assert "annotations[0] (id 0) in 2.png (id 2): [20.0, 10.0, 0.0, 6.0]" in text
    assert text.endswith("No problems found.")
    parsed = json.loads(report.to_json())
    assert parsed["ok"] is True
    assert parsed["class_counts"] == {"1": 9, "4": 1, "5": 0}
    assert [finding["kind"] for finding in parsed["warnings"]] == ["box without area", "too many objects"]


def test_missing_truncated_and_foreign_images(folder: Path) -> None:
    (folder / "2.png").unlink()
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:300])
    (folder / "6.png").write_text("no image")
    report = check_dataset(folder, sound_coco())
    assert not report.ok
    count, example = found(report, "unreadable image")
    assert count == 3
    assert "2.png does not exist" in example
    assert report.render().endswith("This data set cannot be trained on as it is.")


def test_size_mismatch(folder: Path) -> None:
    contents = sound_coco()
    contents["images"][1].update(width=120, height=80)
    count, example = found(check_dataset(folder, contents), "image size")
    assert count == 1
    assert example == "5.png (id 5) is 60 x 40, the annotations say 120 x 80"


@pytest.mark.parametrize("annotated", [(60, 40), (40, 60)])
def test_sideways_photo_fits_either_way(folder: Path, annotated: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(folder / "6.png", exif=exif)
    contents = sound_coco()
    contents["images"][2].update(width=annotated[0], height=annotated[1])
    assert check_dataset(folder, contents).ok


def test_sizes_come_from_the_files_where_the_annotations_lack_them(folder: Path) -> None:
    contents = sound_coco()
    for image in contents["images"]:
        del image["width"], image["height"]
    contents["annotations"][3]["bbox"] = [50, 30, 40, 5]
    report = check_dataset(folder, contents)
    assert report.image_widths.maximum == 60
    assert found(report, "box beyond border")[0] == 1


def test_boxes_outside_without_area_and_beyond_the_border(folder: Path) -> None:
    contents = sound_coco()
    boxes = [[70, 10, 5, 5], [-9, 5, 9, 5], [10, 10, 0, 5], [55, 30, 20, 5], [-3, 5, 10, 10], [50, 30, 10.6, 10.4]]
    for annotation, bbox in zip(contents["annotations"], boxes, strict=False):
        annotation["bbox"] = bbox
    report = check_dataset(folder, contents)
    assert report.ok
    assert found(report, "box outside")[0] == 2
    assert found(report, "box without area")[0] == 1
    assert found(report, "box beyond border")[0] == 2
    dataset = CocoDetection(folder, contents)
    assert report.num_objects == sum(len(dataset[index][1]["labels"]) for index in range(3)) == 8


def test_corner_boxes_are_recognised(folder: Path) -> None:
    contents = sound_coco()
    for annotation in contents["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]
    report = check_dataset(folder, contents)
    assert not report.ok
    assert "look like corners" in report.render()


def test_boxes_as_fractions_are_recognised(folder: Path) -> None:
    contents = sound_coco()
    for annotation in contents["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x / 60, y / 40, width / 60, height / 40]
    report = check_dataset(folder, contents)
    assert not report.ok
    assert "look like fractions of the image" in report.render()


def test_more_objects_than_queries(folder: Path) -> None:
    report = check_dataset(folder, sound_coco(), num_queries=9)
    assert report.ok
    assert report.num_images_over_queries == 1
    assert found(report, "too many objects") == (1, "2.png (id 2) has 10")


def test_duplicates(folder: Path) -> None:
    contents = sound_coco()
    contents["annotations"].append(dict(contents["annotations"][4]))
    contents["images"][2]["file_name"] = "2.png"
    report = check_dataset(folder, contents)
    assert found(report, "duplicate id") == (1, "id 4")
    assert found(report, "duplicate file") == (1, "2.png")
    assert found(report, "duplicate box")[0] == 1
    assert report.ok


def test_unusable_entries_are_all_listed_and_the_rest_is_counted(folder: Path) -> None:
    contents = sound_coco()
    contents["annotations"][0]["image_id"] = 99
    contents["annotations"][1]["category_id"] = 2
    contents["annotations"][2]["bbox"] = [1, 2, float("nan"), 4]
    contents["annotations"][3]["bbox"] = [1, 2, -3, 4]
    del contents["annotations"][4]["category_id"]
    contents["annotations"][5] = "text"
    contents["images"].append(dict(contents["images"][0]))
    report = check_dataset(folder, contents)
    assert not report.ok
    assert found(report, "unknown image") == (1, "annotations[0] (id 0): 'image_id' 99 is no id in 'images'")
    assert found(report, "unknown category")[0] == 1
    assert found(report, "bad bbox")[0] == 2
    assert found(report, "missing key") == (1, "annotations[4] (id 4): the key 'category_id' is missing")
    assert found(report, "wrong type")[0] == 1
    assert found(report, "duplicate id") == (1, "images: 'id' 2 stands 2 times")
    assert (report.num_annotations, report.num_objects, report.num_images) == (6, 5, 3)
    with pytest.raises(AnnotationError, match="and 6 more"):
        CocoDetection(folder, contents)


@pytest.mark.parametrize("contents", [{}, {"images": [], "annotations": [], "categories": []}])
def test_files_without_anything_to_check(folder: Path, contents: dict[str, Any]) -> None:
    report = check_dataset(folder, contents)
    assert not report.ok
    assert report.render()
    assert json.loads(report.to_json())["ok"] is False


def test_images_without_any_annotation(folder: Path) -> None:
    report = check_dataset(folder, sound_coco() | {"annotations": [], "categories": []})
    assert report.ok
    assert (report.num_empty_images, report.num_objects, report.category_id_gaps) == (3, 0, [])
    assert report.render()


def test_examples_are_few_and_the_rest_is_counted(folder: Path) -> None:
    contents = sound_coco()
    for annotation in contents["annotations"]:
        annotation["bbox"] = [1, 1, 0, 0]
    assert "and 6 more" in check_dataset(folder, contents).render()


def test_progress_reaches_the_number_of_images(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    check_dataset(folder, sound_coco(), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(AnnotationError, match=r"absent\.json cannot be opened"):
        check_dataset(folder, folder / "absent.json")


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco_passes(shared_data: Path, split: str) -> None:
    root = shared_data / "coco200"
    report = check_dataset(root / "images" / split, root / "annotations" / f"instances_{split}.json")
    assert report.ok, report.render()
    assert report.num_images == 100
    assert report.category_id_gaps == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert report.num_crowd > 0


def test_real_blood_cells_have_two_empty_boxes(bccd: tuple[Path, Path]) -> None:
    report = check_dataset(*bccd)
    assert report.ok, report.render()
    assert [(finding.kind, finding.count) for finding in report.warnings] == [("box without area", 2)]
    assert report.category_names == {1: "WBC", 2: "RBC", 3: "Platelets"}
    assert report.num_objects == report.num_annotations - 2
