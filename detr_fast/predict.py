"""Detection on image files: pictures with boxes or segments, and results in COCO's formats."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from detr_fast.attention_maps import PointError, capture_attention, draw_attention
from detr_fast.checkpoint import prepare_output_folder
from detr_fast.data.annotations import AnnotationError, load_json, name_of
from detr_fast.data.find import find_images
from detr_fast.data.images import ImageError, load_image
from detr_fast.panoptic_prediction import PanopticPrediction
from detr_fast.pipeline import Speed, ahead, batches, helpers
from detr_fast.predictor import Prediction, Predictor, PreparedImage

__all__ = ["FailedFile", "PredictSummary", "Prediction", "Predictor", "find_images", "predict_files"]

# Labels cannot be read on a smaller picture, so it is enlarged.
SMALLEST_PICTURE_PX = 400
# Images that may wait for the model, and for a thread that writes their results, beyond a batch.
LOOK_AHEAD = 8
# JPEG ends at 65535 pixels a side, and Pillow refuses more than 65500.
LARGEST_JPEG_PX = 65500
# Folder of the PNGs of panoptic segmentations.
SEGMENTS = "panoptic"


@dataclass(frozen=True)
class FailedFile:
    """A file that was skipped, or whose attention could not be drawn, and why."""

    path: Path
    reason: str


@dataclass
class PredictSummary:
    """What a run over files did.

    Attributes:
        output: the folder with the pictures, ``images.json``, and ``predictions.json`` or ``panoptic.json``.
        images: one entry for each image done: ``id``, ``file_name`` (as it was given), ``width``, ``height``,
            ``detections`` or ``segments`` (how many), ``picture`` (its file in ``output``), and ``attention`` where
            that was drawn.
        predictions: all detections in COCO's results format, or all images' segments in its panoptic format.
        categories: of segments, in COCO's panoptic format; None where boxes are predicted.
        failed: the files that were not done.
        unannotated: the files that the annotation file does not name; they have ids beyond its own.
        speed: how fast it was, and what bounded it.
    """

    output: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    failed: list[FailedFile] = field(default_factory=list)
    unannotated: list[Path] = field(default_factory=list)
    speed: Speed = field(default_factory=Speed)
    categories: list[dict[str, Any]] | None = None

    @property
    def ok(self) -> bool:
        """Whether every file was done."""
        return not self.failed

    def render(self) -> str:
        """Say it in a few lines."""
        kind = "detections" if self.categories is None else "segments"
        count = sum(entry[kind] for entry in self.images)
        lines = [f"{count} {kind} in {len(self.images)} images, written to {self.output}"]
        lines.append(self.speed.render())
        lines += [f"failed: {failure.path}: {failure.reason}" for failure in self.failed]
        lines += [f"{path} is not in the annotation file: its image id is a new one" for path in self.unannotated]
        return "\n".join(lines)

    def write(self) -> None:
        """Write ``images.json``, and ``predictions.json`` or ``panoptic.json``."""
        failed = [{"file_name": str(failure.path), "error": failure.reason} for failure in self.failed]
        if self.categories is None:
            _write_json(self.output / "predictions.json", self.predictions)
        else:
            contents = {"images": self.images, "annotations": self.predictions, "categories": self.categories}
            _write_json(self.output / "panoptic.json", contents)
        _write_json(self.output / "images.json", {"images": self.images, "failed": failed})


@dataclass(frozen=True)
class AttentionFigures:
    """What attention figures show.

    Attributes:
        points_px: points (x, y) in pixels, the same for each image, whose self-attention in the encoder is drawn; None
            takes the centres of the detections.
        max_detections: the best so many detections of an image are drawn with the decoder's attention.
    """

    points_px: Sequence[tuple[float, float]] | None = None
    max_detections: int = 4


def predict_files(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    predictor: Predictor,
    output: str | os.PathLike[str],
    *,
    annotations: str | os.PathLike[str] | dict[str, Any] | None = None,
    recursive: bool = False,
    attention: AttentionFigures | bool = False,
    panoptic: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PredictSummary:
    """Detect the objects in image files, or divide them into segments, and write it to the folder ``output``.

    Each image gives a picture with labelled boxes (``<name>.jpg``; a second image of the same name ``<name>_2.jpg``)
    and, if asked for, a figure of the attention (``<name>_attention.png``). ``predictions.json`` holds all detections
    in COCO's results format, ``images.json`` which id belongs to which file. With ``panoptic`` the picture shows
    segments with names, and ``panoptic/<name>.png`` and ``panoptic.json`` are in COCO's panoptic format. A file that
    cannot be read is skipped and stands in the summary. An interrupted run (Ctrl-C) leaves whole pictures, and both
    JSON files of the images done.

    Files are read and results are written beside the model, where it leaves cores for that.

    Args:
        inputs: files, folders and glob patterns, in any mixture.
        predictor: its ``batch_size`` images are read and run together.
        output: made where it is missing; files of an earlier run are replaced.
        annotations: a COCO annotation file, whose image ids are taken by file name. Without it images are numbered from
            1 in the order of the files.
        recursive: look into the folders inside a folder too.
        attention: whether to draw the attention, and of what.
        panoptic: segments in place of boxes, of queries whose class is at least so probable.
        on_progress: called after each file with the number of files done and of all files.

    Raises:
        FileNotFoundError: a folder or a pattern holds no image.
        CheckpointError: ``output`` cannot be written; known before the first image is read.
        AnnotationError: the annotations do not fit the files.
        ValueError: an output would replace an input.
        TypeError: attention is asked of a model that is not a ``Detr``, or segments of one without a mask head.
    """
    categories = None if panoptic is None else _panoptic_categories(predictor)
    figures = AttentionFigures() if attention is True else attention or None
    if figures is not None:
        with capture_attention(predictor.model):
            pass  # a model that has no such attention says so before the first image
    jobs = _plan(find_images(inputs, recursive=recursive), Path(output), annotations)
    unannotated = [job.path for job in jobs if annotations is not None and job.annotation is None]
    summary = PredictSummary(prepare_output_folder(output), unannotated=unannotated, categories=categories)
    if panoptic is not None:
        prepare_output_folder(summary.output / SEGMENTS)
    order = {job.stem: number for number, job in enumerate(jobs)}
    run = _Run(predictor, summary.output, figures, panoptic)
    done: list[_Found] = []
    try:
        with helpers(predictor.device) as pool:
            most = predictor.batch_size + LOOK_AHEAD
            read = ahead(run.read, jobs, pool, most)
            detected = summary.speed.timed("the model", run.detect(summary.speed.timed("reading images", read)))
            written = ahead(partial(run.write, done=done), detected, pool, most)
            for number, _ in enumerate(summary.speed.timed("writing results", written), 1):
                if on_progress is not None:
                    on_progress(number, len(jobs))
    finally:
        for found in sorted(done, key=lambda found: order[found.job.stem]):
            found.add_to(summary)
        summary.speed.stop(len(summary.images))
        summary.write()
    return summary


class _Job(NamedTuple):
    """A file to do, its image id, the stem of its outputs, and its entry in the annotation file."""

    path: Path
    stem: str
    image_id: int
    annotation: dict[str, Any] | None

    @property
    def annotated_size(self) -> tuple[int, int] | None:
        entry = self.annotation or {}
        return (entry["width"], entry["height"]) if "width" in entry and "height" in entry else None


def _plan(paths: list[Path], output: Path, annotations: str | os.PathLike[str] | dict[str, Any] | None) -> list[_Job]:
    """Settle every name and id, so that whatever cannot work is known before the first image is read."""
    stems = output_stems(paths)
    _check_inputs_survive(paths, output, stems)
    if annotations is None:
        return [_Job(path, stem, i, None) for i, (path, stem) in enumerate(zip(paths, stems, strict=True), 1)]
    known = _annotated_images(annotations)
    entries = [_entry_of(path, known) for path in paths]
    _check_entries(paths, entries, name_of(annotations))
    new_ids = iter(range(1 + max(entry["id"] for entry in known.values()), 1 << 63))
    ids = [entry["id"] if entry else next(new_ids) for entry in entries]
    return [_Job(*columns) for columns in zip(paths, stems, ids, entries, strict=True)]


def output_stems(paths: list[Path]) -> list[str]:
    """Name the outputs of each file after it; "_2" and so on keep files of one name apart, on any file system."""
    taken: set[str] = set()
    stems = []
    for path in paths:
        stem, number = path.stem, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{path.stem}_{number}"
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def _check_inputs_survive(paths: list[Path], output: Path, stems: list[str]) -> None:
    folder = os.path.realpath(output)
    endings = (".jpg", ".png", "_attention.png")
    outputs = {os.path.join(folder, stem + ending) for stem in stems for ending in endings}
    outputs |= {os.path.join(folder, SEGMENTS, stem + ".png") for stem in stems}
    for path in paths:
        if os.path.realpath(path) in outputs:
            raise ValueError(f"output must be another folder than {output}: {path} would be replaced by a drawing")


def _annotated_images(annotations: str | os.PathLike[str] | dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the image entries of a COCO file by file name; one without annotations (a test set) will do."""
    entries = load_json(annotations).get("images")
    if not isinstance(entries, list) or not entries:
        raise AnnotationError(f"{name_of(annotations)}: 'images' must be a list of at least one image")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or "file_name" not in entry:
            raise AnnotationError(f"{name_of(annotations)}: an image needs a number 'id' and 'file_name', got {entry}")
    return {str(entry["file_name"]).replace("\\", "/"): entry for entry in entries}


def _entry_of(path: Path, known: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Find the entry whose file name is the longest end of the path: "val/1.jpg" before "1.jpg"."""
    parts = Path(os.path.abspath(path)).parts
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((known[end] for end in ends if end in known), None)


def _check_entries(paths: list[Path], entries: list[dict[str, Any] | None], source: str) -> None:
    if not any(entries):
        raise AnnotationError(f"{source} names none of the {len(paths)} images, such as {paths[0].name}")
    first: dict[int, Path] = {}
    for path, entry in zip(paths, entries, strict=True):
        if entry and first.setdefault(entry["id"], path) is not path:
            raise AnnotationError(
                f"{source}: {first[entry['id']]} and {path} would both be image {entry['id']} ({entry['file_name']})"
            )


@dataclass
class _Found:
    """What is known of a file: the image, what is in it, and what was written about it."""

    job: _Job
    image: PreparedImage | None = None
    prediction: Prediction | PanopticPrediction | None = None
    entry: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    def add_to(self, summary: PredictSummary) -> None:
        if self.failure is not None:
            summary.failed.append(FailedFile(self.job.path, self.failure))
        if self.entry:
            summary.images.append(self.entry)
        summary.predictions += self.predictions


@dataclass(frozen=True)
class _Run:
    """The three parts of the way from a file to its results; the first and the last run in threads."""

    predictor: Predictor
    output: Path
    figures: AttentionFigures | None
    panoptic: float | None

    def read(self, job: _Job) -> _Found:
        try:
            picture = load_image(job.path, annotated_size=job.annotated_size)
        except ImageError as error:
            return _Found(job, failure=str(error))
        return _Found(job, self.predictor.prepare(picture))

    def detect(self, read: Iterable[_Found]) -> Iterator[_Found]:
        for batch in batches(read, self.predictor.batch_size):
            readable = [found for found in batch if found.image is not None]
            images = [found.image for found in readable if found.image is not None]
            for found, prediction in zip(readable, predict_batch(self.predictor, images, self.panoptic), strict=True):
                found.prediction, found.entry = prediction, _image_entry(found.job, prediction)
                if self.figures is not None:
                    _write_attention(found, self.predictor, self.figures, self.output)
            yield from batch

    def write(self, found: _Found, done: list[_Found]) -> None:
        """Write an image's files; only then does it stand in ``done``, without its pixels."""
        job, image, prediction = found.job, found.image, found.prediction
        if image is not None and prediction is not None:
            drawn = prediction.draw(image.picture, min_size=SMALLEST_PICTURE_PX)
            found.entry["picture"] = _write_picture(self.output / job.stem, drawn).name
            if isinstance(prediction, PanopticPrediction):
                found.predictions = [_write_segments(job, prediction, self.output)]
            else:
                found.predictions = prediction.to_coco(job.image_id)
        found.image = found.prediction = None
        done.append(found)


def predict_batch(
    predictor: Predictor, images: Sequence[PreparedImage], panoptic: float | None
) -> Sequence[Prediction | PanopticPrediction]:
    """Boxes, or segments of queries whose class is at least ``panoptic`` probable, of any number of images."""
    if not images:
        return []
    return predictor(images) if panoptic is None else predictor.panoptic(images, threshold=panoptic)


def _image_entry(job: _Job, prediction: Prediction | PanopticPrediction) -> dict[str, Any]:
    height, width = prediction.size
    kind = "segments" if isinstance(prediction, PanopticPrediction) else "detections"
    return {"id": job.image_id, "width": width, "height": height, kind: len(prediction), "file_name": str(job.path)}


def _panoptic_categories(predictor: Predictor) -> list[dict[str, Any]]:
    return [
        {"id": number, "name": predictor.categories.get(number, f"class {number}"), "isthing": int(is_thing)}
        for number, is_thing in predictor.things().items()
    ]


def _write_segments(job: _Job, prediction: PanopticPrediction, output: Path) -> dict[str, Any]:
    name = f"{job.stem}.png"
    write_whole(output / SEGMENTS / name, lambda partial: partial.write_bytes(prediction.png()))
    return prediction.to_coco(job.image_id, name)


def _write_picture(stem: Path, drawn: Image.Image) -> Path:
    # with_suffix would cut "frame.0001" short.
    if max(drawn.size) <= LARGEST_JPEG_PX:
        path = stem.with_name(stem.name + ".jpg")
        write_whole(path, lambda partial: drawn.save(partial, format="JPEG", quality=92, subsampling=0))
    else:
        path = stem.with_name(stem.name + ".png")
        write_whole(path, lambda partial: drawn.save(partial, format="PNG"))
    return path


def _write_attention(found: _Found, predictor: Predictor, figures: AttentionFigures, output: Path) -> None:
    path = output / f"{found.job.stem}_attention.png"
    assert found.image is not None
    try:
        maps = predictor.attention(found.image, points_px=figures.points_px, max_detections=figures.max_detections)
    except PointError as error:
        # The points of the run may lie outside one of its images; the others still get their figures.
        found.failure = str(error)
        return
    write_whole(path, lambda partial: draw_attention(maps, partial))
    found.entry["attention"] = path.name


def _write_json(path: Path, contents: Any) -> None:
    write_whole(path, lambda partial: partial.write_text(json.dumps(contents), encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file all or nothing: an interrupted run leaves no half of one."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
