"""Panoptic quality: the official tool's published numbers, and ground truth through our own post-processing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast import PostProcessPanoptic
from detr_fast.data.annotations import AnnotationError
from detr_fast.data.coco_panoptic import read_segment_ids, segment_masks
from detr_fast.panoptic_evaluator import PanopticEvaluator, PanopticResult


def png(ids: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.stack((ids % 256, ids // 256 % 256, ids // 65536), -1).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def coco200(shared_data: Path) -> Path:
    folder = shared_data / "coco200" / "annotations"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    return folder


def evaluator(coco200: Path) -> PanopticEvaluator:
    return PanopticEvaluator(coco200 / "panoptic_val2017.json", coco200 / "panoptic_val2017")


def test_the_official_tools_numbers_on_real_predictions(shared_data: Path, coco200: Path) -> None:
    folder = shared_data / "fixtures" / "pq_coco200_official"
    expected = json.loads((folder / "expected.json").read_text())["pred_vs_gt"]
    predictions = json.loads((folder / "pred_val2017.json").read_text())["annotations"]
    measured = evaluator(coco200)
    for entry in predictions:
        data = (folder / "pred_val2017" / entry["file_name"]).read_bytes()
        measured.update({entry["image_id"]: {"png_string": data, "segments_info": entry["segments_info"]}})
    result = measured.summarize()
    for name, quality in (("All", result.every), ("Things", result.things), ("Stuff", result.stuff)):
        for key in ("pq", "sq", "rq"):
            assert getattr(quality, key) == pytest.approx(expected[name][key], abs=1e-12)
        assert quality.classes == expected[name]["n"]
    assert [round(q.pq, 6) for q in (result.every, result.things, result.stuff)] == [0.457403, 0.415669, 0.518399]
    totals = expected["totals"]
    assert (result.every.tp, result.every.fp, result.every.fn) == (totals["tp"], totals["fp"], totals["fn"])
    for number, name in measured.categories.items():
        if name in result.per_class:
            assert result.per_class[name].pq == pytest.approx(expected["per_class"][str(number)]["pq"], abs=1e-12)


def test_ground_truth_through_our_post_processing_is_perfect(coco200: Path) -> None:
    measured = evaluator(coco200)
    postprocess = PostProcessPanoptic(measured.is_thing_map)
    for image_id, entry in measured.annotations.items():
        ids = read_segment_ids(coco200 / "panoptic_val2017" / entry["file_name"])
        infos = entry["segments_info"]
        masks = torch.from_numpy(segment_masks(ids, infos, ""))
        logits = torch.full((1, len(infos), 202), -20.0)
        logits[0, range(len(infos)), [info["category_id"] for info in infos]] = 20
        (prediction,) = postprocess({"pred_logits": logits, "pred_masks": masks[None] * 20.0 - 10}, [ids.shape])
        measured.update({image_id: prediction})
    result = measured.summarize()
    assert (result.every.pq, result.things.pq, result.stuff.pq) == (1, 1, 1)
    assert (result.every.tp, result.every.fp, result.every.fn) == (1073, 0, 0) and result.every.classes == 124
    assert result.num_unseen == 0 and "PQ" in result.table() and '"pq": 1.0' in result.to_json()


def deeplab2(shared_data: Path, known: dict, tmp_path: Path, names: list[str]) -> PanopticResult:
    """The cases of deeplab2: a picture of classes by colour and one of instances by grey; class 0 is ignored."""
    folder = shared_data / "fixtures" / "pq_deeplab2"
    colors = {tuple(map(int, key.split(","))): value for key, value in known["class_colors"].items()}
    categories = [{"id": number, "name": f"class {number}", "isthing": number % 2} for number in range(1, 7)]
    contents: dict = {"images": [], "annotations": [], "categories": categories}
    predictions = {}
    for number, name in enumerate(names):
        truth_name = f"{name}_gt_instance.png" if name == "team" else f"{name}_gt.png"
        grey = np.asarray(Image.open(folder / truth_name).convert("L")).astype(int)
        class_of_grey = {int(key): value for key, value in known["gt_grey_to_class"][truth_name].items()}
        ignored = np.isin(grey, [g for g, category in class_of_grey.items() if category == 0])
        write(tmp_path / f"{name}.png", np.where(ignored, 0, grey + 1))
        infos = [{"id": g + 1, "category_id": c} for g, c in class_of_grey.items() if c and (grey == g).any()]
        rgb = np.asarray(Image.open(folder / f"{name}_pred_class.png").convert("RGB")).astype(int)
        classes = np.zeros(grey.shape, dtype=int)
        for color, category in colors.items():
            classes[(rgb == color).all(-1)] = category
        instance = np.asarray(Image.open(folder / f"{name}_pred_instance.png").convert("L")).astype(int)
        ids = np.where(classes > 0, classes * 256 + instance, 0)
        found = [{"id": int(i), "category_id": int(i) // 256} for i in np.unique(ids) if i]
        predictions[number] = {"png_string": png(ids), "segments_info": found}
        contents["images"].append({"id": number, "file_name": f"{name}.jpg"})
        contents["annotations"].append({"image_id": number, "file_name": f"{name}.png", "segments_info": infos})
    measured = PanopticEvaluator(contents, tmp_path)
    measured.update(predictions)
    return measured.summarize()


def write(path: Path, ids: np.ndarray) -> None:
    path.write_bytes(png(ids))


@pytest.mark.parametrize("case", ["team", "team+bird+cat"])
def test_the_cases_of_deeplab2(case: str, shared_data: Path, known_answers: dict, tmp_path: Path) -> None:
    known = known_answers["pq_deeplab2"]
    result = deeplab2(shared_data, known, tmp_path, case.split("+"))
    for key in ("pq", "sq", "rq"):
        assert getattr(result.every, key) == pytest.approx(known[case][key], abs=1e-4)
    classes = len(result.per_class)
    for key in ("tp", "fp", "fn"):
        assert getattr(result.every, key) / classes == pytest.approx(known[case][key])


def small() -> tuple[dict, np.ndarray]:
    ids = np.zeros((6, 8), dtype=int)
    ids[:3], ids[4:, :4] = 70000, 300
    infos = [{"id": 70000, "category_id": 1}, {"id": 300, "category_id": 2}]
    contents = {
        "images": [{"id": 4, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "sky", "isthing": 0}, {"id": 2, "name": "sky", "isthing": 1}],
        "annotations": [{"image_id": 4, "file_name": "a.png", "segments_info": infos}],
    }
    return contents, ids


def test_an_image_without_prediction_counts(tmp_path: Path) -> None:
    contents, ids = small()
    write(tmp_path / "a.png", ids)
    result = PanopticEvaluator(contents, tmp_path).summarize()
    assert (result.every.pq, result.every.fn, result.num_unseen) == (0, 2, 1)
    assert set(result.per_class) == {"sky (1)", "sky (2)"}
    assert "1 of them got no prediction" in result.table()


def test_a_class_that_the_annotations_lack_is_a_false_positive(tmp_path: Path) -> None:
    contents, ids = small()
    write(tmp_path / "a.png", ids)
    ids[0, :] = 9  # of the sky's three rows one is another's
    infos = [
        {"id": 70000, "category_id": 1},
        {"id": 300, "category_id": 7, "isthing": False},
        {"id": 9, "category_id": 8},
    ]
    prediction = {"png_string": png(ids), "segments_info": infos}
    measured = PanopticEvaluator(contents, tmp_path, names={7: "sea"})
    measured.update({4: prediction})
    result = measured.summarize()
    assert result.unknown == ("sea", "class 8") and (result.every.tp, result.every.fp, result.every.fn) == (1, 2, 1)
    assert result.every.pq == pytest.approx((2 / 3 + 0 + 0 + 0) / 4) and result.stuff.classes == 2
    assert (result.per_class["sea"].pq, result.per_class["sea"].fp) == (0, 1)
    assert "found, but not among the annotations' classes: sea, class 8" in result.table()
    # As COCO's tool has it where the annotations name the classes and have no segment of them.
    listed = [{"id": 7, "name": "sea", "isthing": 0}, {"id": 8, "name": "class 8", "isthing": 1}]
    whole = PanopticEvaluator({**contents, "categories": contents["categories"] + listed}, tmp_path)
    whole.update({4: prediction})
    expected = whole.summarize()
    assert result.stats == expected.stats and result.per_class == expected.per_class and expected.unknown == ()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    contents, ids = small()
    write(tmp_path / "a.png", ids)
    measured = PanopticEvaluator(contents, tmp_path)
    infos = [{"id": 70000, "category_id": 1}, {"id": 300, "category_id": 2}]
    measured.update({4: {"png_string": png(ids), "segments_info": infos}})
    measured.update({4: {"png_string": b"", "segments_info": []}})  # the first one stays
    path = measured.write(tmp_path / "out")
    assert json.loads(path.read_text())["annotations"][0]["segments_info"] == infos
    np.testing.assert_array_equal(read_segment_ids(tmp_path / "out" / "a.png"), ids)
    measured.synchronize()
    assert measured.summarize().every.pq == 1


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    contents, ids = small()
    write(tmp_path / "a.png", ids)
    measured = PanopticEvaluator(contents, tmp_path)
    with pytest.raises(ValueError, match="image id 5 is not among the 1 annotated images"):
        measured.update({5: {}})
    measured.update({4: {"png_string": png(ids[:, :5]), "segments_info": []}})
    with pytest.raises(ValueError, match=r"image 4|a\.png"):
        measured.summarize()
    del contents["categories"][0]["isthing"]
    with pytest.raises(AnnotationError, match="the key 'isthing' is missing"):
        PanopticEvaluator(contents, tmp_path)
