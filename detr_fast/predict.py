"""Detection on image files: pictures with boxes or segments, and results in COCO's formats."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from detr_fast.attention_maps import PointError, capture_attention, draw_attention
from detr_fast.checkpoint import prepare_output_folder
from detr_fast.data.annotations import AnnotationError, load_json, name_of
from detr_fast.data.images import ImageError, load_image
from detr_fast.panoptic_prediction import PanopticPrediction
from detr_fast.predictor import Prediction, Predictor

__all__ = ["FailedFile", "PredictSummary", "Prediction", "Predictor", "find_images", "predict_files"]

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
# Labels cannot be read on a smaller picture, so it is enlarged.
SMALLEST_PICTURE_PX = 400
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
    """

    output: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    failed: list[FailedFile] = field(default_factory=list)
    unannotated: list[Path] = field(default_factory=list)
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

    Args:
        inputs: files, folders and glob patterns, in any mixture.
        predictor: its ``batch_size`` images are read and run together.
        output: made where it is missing; files of an earlier run are replaced.
        annotations: a COCO annotation file, whose image ids are taken by file name. Without it images are numbered from
            1 in the order of the files.
        recursive: look into the folders inside a folder too.
        attention: whether to draw the attention, and of what.
        panoptic: segments in place of boxes, of queries whose class is at least so probable.
        on_progress: called after each batch with the number of files done and of all files.

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
    try:
        for start in range(0, len(jobs), predictor.batch_size):
            batch = jobs[start : start + predictor.batch_size]
            _run(batch, predictor, figures, panoptic, summary)
            if on_progress is not None:
                on_progress(start + len(batch), len(jobs))
    finally:
        summary.write()
    return summary


def find_images(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, recursive: bool = False
) -> list[Path]:
    """List the image files that files, folders and glob patterns name, each once.

    A folder gives its files with an image's suffix, sorted by name; a pattern those that it matches, or where it
    matches none, the other files or the folders it matches; a file itself, whether or not it exists: whoever reads it
    reports it.

    Raises:
        FileNotFoundError: a folder or a pattern gives no file.
        ValueError: ``inputs`` is empty.
    """
    listed = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not listed:
        raise ValueError("inputs must name at least one image, folder or pattern, got none")
    found: dict[str, Path] = {}
    for entry in listed:
        for path in _expand(os.fspath(entry), recursive):
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def _expand(entry: str, recursive: bool) -> list[Path]:
    if os.path.isdir(entry):
        return _images_in(Path(entry), recursive)
    if os.path.exists(entry) or not glob.has_magic(entry):
        return [Path(entry)]
    matches = sorted(glob.glob(entry, recursive=True))
    files = [Path(match) for match in matches if not os.path.isdir(match)]
    if files:
        # "photos/*" need not fail for the notes beside the photos, but "scans/*.dat" means what it says.
        return [path for path in files if _has_image_suffix(path)] or files
    if not matches:
        raise FileNotFoundError(f"the pattern {entry} matches no file")
    return [path for match in matches for path in _images_in(Path(match), recursive)]


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    files = folder.rglob("*") if recursive else folder.iterdir()
    images = sorted(path for path in files if _has_image_suffix(path) and path.is_file())
    if not images:
        hint = "" if recursive else " (folders inside it are searched with recursive)"
        raise FileNotFoundError(f"the folder {folder} holds no image{hint}")
    return images


def _has_image_suffix(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


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
    stems = _output_stems(paths)
    _check_inputs_survive(paths, output, stems)
    if annotations is None:
        return [_Job(path, stem, i, None) for i, (path, stem) in enumerate(zip(paths, stems, strict=True), 1)]
    known = _annotated_images(annotations)
    entries = [_entry_of(path, known) for path in paths]
    _check_entries(paths, entries, name_of(annotations))
    new_ids = iter(range(1 + max(entry["id"] for entry in known.values()), 1 << 63))
    ids = [entry["id"] if entry else next(new_ids) for entry in entries]
    return [_Job(*columns) for columns in zip(paths, stems, ids, entries, strict=True)]


def _output_stems(paths: list[Path]) -> list[str]:
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


def _run(
    batch: list[_Job],
    predictor: Predictor,
    figures: AttentionFigures | None,
    panoptic: float | None,
    summary: PredictSummary,
) -> None:
    """Do one batch: read what can be read, detect, and write each image's files before it enters the summary."""
    readable = []
    for job in batch:
        try:
            readable.append((job, load_image(job.path, annotated_size=job.annotated_size)))
        except ImageError as error:
            summary.failed.append(FailedFile(job.path, str(error)))
    pictures = [picture for _, picture in readable]
    predictions: Sequence[Prediction | PanopticPrediction] = []
    if pictures:
        predictions = predictor(pictures) if panoptic is None else predictor.panoptic(pictures, threshold=panoptic)
    for (job, picture), prediction in zip(readable, predictions, strict=True):
        entry = _image_entry(job, prediction)
        drawn = prediction.draw(picture, min_size=SMALLEST_PICTURE_PX)
        entry["picture"] = _write_picture(summary.output / job.stem, drawn).name
        if figures is not None:
            _write_attention(job, picture, entry, predictor, figures, summary)
        if isinstance(prediction, PanopticPrediction):
            summary.predictions.append(_write_segments(job, prediction, summary.output))
        else:
            summary.predictions += prediction.to_coco(job.image_id)
        summary.images.append(entry)


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
    _write_whole(output / SEGMENTS / name, lambda partial: partial.write_bytes(prediction.png()))
    return prediction.to_coco(job.image_id, name)


def _write_picture(stem: Path, drawn: Image.Image) -> Path:
    # with_suffix would cut "frame.0001" short.
    if max(drawn.size) <= LARGEST_JPEG_PX:
        path = stem.with_name(stem.name + ".jpg")
        _write_whole(path, lambda partial: drawn.save(partial, format="JPEG", quality=92, subsampling=0))
    else:
        path = stem.with_name(stem.name + ".png")
        _write_whole(path, lambda partial: drawn.save(partial, format="PNG"))
    return path


def _write_attention(
    job: _Job,
    picture: Image.Image,
    entry: dict[str, Any],
    predictor: Predictor,
    figures: AttentionFigures,
    summary: PredictSummary,
) -> None:
    path = summary.output / f"{job.stem}_attention.png"
    try:
        maps = predictor.attention(picture, points_px=figures.points_px, max_detections=figures.max_detections)
    except PointError as error:
        # The points of the run may lie outside one of its images; the others still get their figures.
        summary.failed.append(FailedFile(job.path, str(error)))
        return
    _write_whole(path, lambda partial: draw_attention(maps, partial))
    entry["attention"] = path.name


def _write_json(path: Path, contents: Any) -> None:
    _write_whole(path, lambda partial: partial.write_text(json.dumps(contents), encoding="utf-8"))


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file all or nothing: an interrupted run leaves no half of one."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
