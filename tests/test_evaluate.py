"""COCO AP: known answers, pycocotools on random data, several processes, and a model's run over real images."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from random_coco import Prediction, by_image, random_ground_truth, random_results, reference_stats, sizes_of, without
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from detr_fast.build import model_from_args
from detr_fast.checkpoint import save_checkpoint
from detr_fast.data.annotations import AnnotationError
from detr_fast.data.batch import ImageBatch, collate
from detr_fast.data.coco import CocoDetection
from detr_fast.data.transforms import eval_transforms
from detr_fast.evaluate import STAT_NAMES, CocoEvaluator, evaluate, evaluate_checkpoint
from detr_fast.postprocess import PostProcess

# pycocotools' own use of numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_known_answers(shared_data: Path, known_answers: dict, iou_type: str) -> None:
    folder = shared_data / "fixtures" / "cocoeval"
    contents = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / f"instances_val2014_fake{iou_type}100_results.json").read_text())
    image_ids = [image["id"] for image in contents["images"]]
    evaluator = CocoEvaluator(folder / "instances_val2014_100.json", (iou_type,))
    evaluator.update(by_image(results, image_ids, sizes_of(contents)))
    result = evaluator.summarize()
    expected = known_answers["cocoeval"][f"{iou_type}(fake{iou_type}100, all 100 image ids)"]
    assert [result.stats[name] for name in STAT_NAMES] == pytest.approx(expected, abs=1e-9)
    assert result.num_images == 100
    assert result.num_unseen == 0


def test_only_the_images_asked_for_count(shared_data: Path, known_answers: dict) -> None:
    folder = shared_data / "fixtures" / "cocoeval"
    contents = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    detected = sorted({entry["image_id"] for entry in results})
    evaluator = CocoEvaluator(contents, image_ids=detected)
    evaluator.update(by_image(results, detected, sizes_of(contents)))
    expected = known_answers["cocoeval"]["bbox if only the 99 images with detections are evaluated"]
    assert list(evaluator.summarize().stats.values()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("repetition", range(3))
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_numbers_equal_pycocotools(iou_type: str, repetition: int) -> None:
    contents = random_ground_truth()
    results = random_results(contents)
    image_ids = [image["id"] for image in contents["images"]]
    evaluator = CocoEvaluator(contents, ("bbox", "segm"))
    evaluator.update(by_image(results, image_ids, sizes_of(contents)))
    result = evaluator.summarize(iou_type)
    expected = reference_stats(contents, without(results, "bbox" if iou_type == "segm" else "segmentation"), iou_type)
    assert 0.02 < expected[0] < 0.98
    assert list(result.stats.values()) == pytest.approx(expected, abs=1e-9)
    measured = [value for value in result.per_class.values() if value >= 0]
    assert np.mean(measured) == pytest.approx(result.stats["AP"])


def test_per_class_equals_pycocotools_on_that_class() -> None:
    contents = random_ground_truth()
    results = random_results(contents)
    evaluator = CocoEvaluator(contents)
    evaluator.update(by_image(results, [image["id"] for image in contents["images"]], sizes_of(contents)))
    per_class = evaluator.summarize().per_class
    for category in contents["categories"]:
        chosen = [entry for entry in contents["annotations"] if entry["category_id"] == category["id"]]
        alone = contents | {"annotations": chosen, "categories": [category]}
        detections = [entry for entry in without(results, "segmentation") if entry["category_id"] == category["id"]]
        assert per_class[category["name"]] == pytest.approx(reference_stats(alone, detections, "bbox")[0])


def test_float32_boxes_and_batches_make_no_difference() -> None:
    contents = random_ground_truth()
    predictions = by_image(random_results(contents), [i["id"] for i in contents["images"]], sizes_of(contents))
    whole, piecewise = CocoEvaluator(contents), CocoEvaluator(contents)
    whole.update(predictions)
    for image_id, prediction in predictions.items():
        piecewise.update({image_id: {key: prediction[key].float() for key in ("scores", "boxes")} | prediction})
    assert piecewise.summarize().stats == pytest.approx(whole.summarize().stats, abs=2e-3)


def tiny_ground_truth() -> dict[str, Any]:
    images = [{"id": number, "file_name": f"{number}.png", "width": 100, "height": 100} for number in (1, 2)]
    box = {"category_id": 3, "bbox": [10, 10, 50, 50], "area": 2500}
    annotations = [box | {"id": number, "image_id": number + 1} for number in (0, 1)]
    categories = [{"id": 3, "name": "a"}, {"id": 5, "name": "b"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def exact_prediction(label: int = 3) -> Prediction:
    boxes = torch.tensor([[10.0, 10, 60, 60]])
    return {"scores": torch.tensor([0.9]), "labels": torch.tensor([label]), "boxes": boxes}


def test_image_that_was_never_passed_counts() -> None:
    evaluator = CocoEvaluator(tiny_ground_truth())
    evaluator.update({1: exact_prediction()})
    result = evaluator.summarize()
    assert result.stats["AR100"] == pytest.approx(0.5)
    assert result.num_unseen == 1
    assert "1 of them got no prediction" in result.table()


def test_annotation_id_zero_can_be_matched() -> None:
    evaluator = CocoEvaluator(tiny_ground_truth())
    evaluator.update({1: exact_prediction(), 2: exact_prediction()})
    assert evaluator.summarize().stats["AP"] == pytest.approx(1)


def test_same_image_twice_counts_once_as_it_came_first() -> None:
    evaluator = CocoEvaluator(tiny_ground_truth())
    evaluator.update({1: exact_prediction(), 2: exact_prediction()})
    evaluator.update({1: exact_prediction(label=5), 2: {}})
    assert evaluator.summarize().stats["AP"] == pytest.approx(1)


def test_labels_without_a_category_and_no_detections_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    evaluator = CocoEvaluator(tiny_ground_truth())
    evaluator.update({1: exact_prediction(label=77), 2: {}})
    result = evaluator.summarize()
    assert result.stats["AP"] == 0
    assert result.stats["APs"] == -1
    assert result.per_class == {"a": 0, "b": -1}
    assert capfd.readouterr() == ("", "")


def test_annotations_without_any_object() -> None:
    evaluator = CocoEvaluator(tiny_ground_truth() | {"annotations": []})
    evaluator.update({1: exact_prediction()})
    assert set(evaluator.summarize().stats.values()) == {-1}


def test_names_that_stand_twice_carry_their_id() -> None:
    contents = tiny_ground_truth()
    contents["categories"][1]["name"] = "a"
    assert CocoEvaluator(contents).summarize().per_class == {"a (3)": 0, "a (5)": -1}


def test_table_and_json() -> None:
    evaluator = CocoEvaluator(tiny_ground_truth())
    evaluator.update({1: exact_prediction(), 2: exact_prediction()})
    result = evaluator.summarize()
    lines = result.table().splitlines()
    assert lines[0] == "COCO bbox, 2 images"
    assert lines[1].split()[:2] == ["AP", "100.0"]
    assert lines[4].split()[:2] == ["APs", "-"]
    assert lines[-2].split() == ["a", "100.0"]
    assert lines[-1] == "  1 classes have no object here"
    assert json.loads(result.to_json()) == result.as_dict()
    assert result.as_dict()["stats"]["AP50"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ({"boxes": torch.zeros(2, 4)}, r"image 1: expected scores \[N\]"),
        ({"labels": torch.zeros(1, 1, dtype=torch.int64)}, r"image 1: expected scores \[N\]"),
        ({"scores": torch.tensor([torch.nan])}, "image 1: scores and boxes must be finite"),
        ({"boxes": torch.full((1, 4), torch.inf)}, "image 1: scores and boxes must be finite"),
    ],
)
def test_bad_predictions_are_named(prediction: Prediction, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CocoEvaluator(tiny_ground_truth()).update({1: exact_prediction() | prediction})


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="image id 9 is not among the 2 images"):
        CocoEvaluator(tiny_ground_truth()).update({9: exact_prediction()})
    with pytest.raises(ValueError, match="iou_types must be of 'bbox' and 'segm'"):
        CocoEvaluator(tiny_ground_truth(), ("keypoints",))
    with pytest.raises(ValueError, match=r"lacks 1 of the image_ids"):
        CocoEvaluator(tiny_ground_truth(), image_ids=[1, 8])
    with pytest.raises(ValueError, match=r"iou_type must be one of \('bbox',\), got 'segm'"):
        CocoEvaluator(tiny_ground_truth()).summarize("segm")
    with pytest.raises(AnnotationError, match=r"annotations\[0\] \(id 0\): evaluating masks needs"):
        CocoEvaluator(tiny_ground_truth(), ("segm",))
    with pytest.raises(AnnotationError, match="the key 'images' is missing"):
        CocoEvaluator({"annotations": [], "categories": []})


class Oracle(nn.Module):
    """A model that is told the answer: the objects of each image, in every query past them the first object."""

    def __init__(self, dataset: Any, num_classes: int) -> None:
        super().__init__()
        self.targets = iter([dataset[index][1] for index in range(len(dataset))])
        self.num_classes = num_classes

    def forward(self, samples: ImageBatch) -> dict[str, Tensor]:
        assert not self.training
        logits = torch.zeros(len(samples), 100, self.num_classes + 1)
        logits[..., -1] = 10
        boxes = torch.full((len(samples), 100, 4), 0.5)
        for row in range(len(samples)):
            target = next(self.targets)
            count = len(target["labels"])
            boxes[row, :count] = target["boxes"]
            logits[row, :count, -1] = 0
            logits[row, torch.arange(count), target["labels"]] = 20
        return {"pred_logits": logits, "pred_boxes": boxes}


class CountObjects(nn.Module):
    """A criterion whose value is known: the number of objects of the images of a batch, averaged."""

    weight_dict = {"loss_count": 2.0}

    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        counts = torch.tensor([float(len(target["labels"])) for target in targets])
        return {"loss_count": counts.mean(), "other": counts.mean() * 0}


def test_model_that_knows_the_answer_has_full_ap(shared_data: Path) -> None:
    root = shared_data / "coco200"
    annotation_file = root / "annotations" / "instances_val2017.json"
    dataset = CocoDetection(root / "images" / "val2017", annotation_file, eval_transforms(64, 96))
    model = Oracle(dataset, dataset.num_classes).train()
    loader = DataLoader(dataset, batch_size=8, collate_fn=collate)
    evaluator = CocoEvaluator(annotation_file)
    result, losses = evaluate(
        model, loader, postprocess=PostProcess(), evaluator=evaluator, device="cpu", criterion=CountObjects()
    )
    assert result.stats["AP"] == pytest.approx(1, abs=1e-3)
    assert result.num_unseen == 0
    mean_count = sum(len(dataset.target(i, (10**4, 10**4))["labels"]) for i in range(100)) / 100
    assert losses == pytest.approx({"loss_count": mean_count, "other": 0, "loss": 2 * mean_count})
    assert model.training


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    """A small untrained model of classes 3 and 5, and the two images of ``tiny_ground_truth`` beside it."""
    args = {"backbone": "tiny", "hidden_dim": 32, "nheads": 2, "enc_layers": 1, "dec_layers": 1}
    args |= {"dim_feedforward": 32, "num_queries": 10, "num_classes": 6}
    model = model_from_args(SimpleNamespace(**args))
    contents = {"model": model.state_dict(), "args": args, "categories": {3: "a", 5: "b"}}
    save_checkpoint(contents, tmp_path / "checkpoint.pth")
    for number in (1, 2):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{number}.png")
    return tmp_path / "checkpoint.pth"


def test_checkpoint_is_evaluated_and_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations.json").write_text(json.dumps(tiny_ground_truth()))
    output = tmp_path / "new" / "result.json"
    result = evaluate_checkpoint(
        tiny_checkpoint, tmp_path, tmp_path / "annotations.json", size=64, num_workers=0, output=output
    )
    assert 0 <= result.stats["AP"] <= 1
    assert result.num_unseen == 0
    assert json.loads(output.read_text()) == result.as_dict()


def test_categories_of_another_name_are_reported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    contents = tiny_ground_truth()
    contents["categories"][0]["name"] = "dog"
    contents["categories"].append({"id": 1, "name": "new"})
    (tmp_path / "annotations.json").write_text(json.dumps(contents))
    with pytest.warns(UserWarning, match=r"another name: 3: 'a' and 'dog'; ids that the checkpoint lacks: \[1\]"):
        evaluate_checkpoint(tiny_checkpoint, tmp_path, tmp_path / "annotations.json", size=64, num_workers=0)


def distributed_run(rank: int, world_size: int, store: str, job: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        JOBS[job](rank, Path(folder))
    finally:
        dist.destroy_process_group()


def share_detections(rank: int, folder: Path) -> None:
    """Rank 0 has all images but the last, rank 1 the last and, as padding, the first; then rank 0 has them all."""
    contents = json.loads((folder / "contents.json").read_text())
    predictions = torch.load(folder / "predictions.pt")
    image_ids = sorted(predictions)
    evaluator = CocoEvaluator(contents)
    if rank == 0:
        evaluator.update({number: predictions[number] for number in image_ids[:-1]})
    else:
        evaluator.update({number: predictions[number] for number in image_ids[-1:]})
        evaluator.update({image_ids[0]: predictions[image_ids[0]]})
    evaluator.synchronize()
    all_on_one = CocoEvaluator(contents)
    if rank == 0:
        all_on_one.update(predictions)
    all_on_one.synchronize()
    results = {"shared": evaluator.summarize().as_dict(), "all on one": all_on_one.summarize().as_dict()}
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


def run_model(rank: int, folder: Path) -> None:
    """Eleven images for two processes: the sampler repeats one."""
    dataset = CocoDetection(folder, folder / "contents.json", eval_transforms(32, 48))
    sampler: Any = DistributedSampler(dataset, shuffle=False)
    loader = DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=collate)
    model = Oracle(Subset(dataset, list(sampler)), dataset.num_classes)
    evaluator = CocoEvaluator(folder / "contents.json")
    result, losses = evaluate(
        model, loader, postprocess=PostProcess(), evaluator=evaluator, device="cpu", criterion=CountObjects()
    )
    (folder / f"rank{rank}.json").write_text(json.dumps({"stats": result.stats, "losses": losses}))
    uneven = [None] * (rank + 1)
    with pytest.raises(ValueError, match=r"same number of batches on every process, got \[1, 2\]"):
        evaluate(model, uneven, postprocess=PostProcess(), evaluator=evaluator, device="cpu", criterion=CountObjects())


JOBS = {job.__name__: job for job in (share_detections, run_model)}


def on_two_processes(job: str, folder: Path) -> list[dict[str, Any]]:
    arguments = (2, str(folder / "store"), job, str(folder))
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=distributed_run, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0, "a process failed or hung"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    contents = random_ground_truth()
    predictions = by_image(random_results(contents), [i["id"] for i in contents["images"]], sizes_of(contents))
    (tmp_path / "contents.json").write_text(json.dumps(contents))
    torch.save(predictions, tmp_path / "predictions.pt")
    alone = CocoEvaluator(contents)
    alone.update(predictions)
    expected = json.loads(alone.summarize().to_json())
    for results in on_two_processes("share_detections", tmp_path):
        assert results == {"shared": expected, "all on one": expected}


def test_two_processes_share_a_data_set_of_odd_length(tmp_path: Path) -> None:
    contents = random_ground_truth()
    dropped = contents["images"].pop()["id"]
    contents["annotations"] = [entry for entry in contents["annotations"] if entry["image_id"] != dropped]
    for image in contents["images"]:
        image["file_name"] = f"{image['id']}.png"
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    (tmp_path / "contents.json").write_text(json.dumps(contents))
    first, second = on_two_processes("run_model", tmp_path)
    assert first == second
    assert first["stats"]["AP"] == pytest.approx(1, abs=1e-3)
    dataset = CocoDetection(tmp_path, contents)
    counts = [len(dataset[index][1]["labels"]) for index in range(len(dataset))]
    # The losses average over what was run, the repeated image included.
    assert first["losses"]["loss_count"] == pytest.approx((sum(counts) + counts[0]) / (len(counts) + 1))
