"""Detection on video files: the same video with boxes or segments drawn, and what was found in each frame."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from detr_fast.checkpoint import prepare_output_folder
from detr_fast.data.find import Inputs, find_images_and_videos
from detr_fast.panoptic_prediction import PanopticPrediction
from detr_fast.pipeline import Speed, ahead, ahead_in_order, batches, helpers, one_thread
from detr_fast.predict import (
    SEGMENTS,
    SMALLEST_PICTURE_PX,
    PredictSummary,
    output_stems,
    predict_batch,
    predict_files,
    write_whole,
)
from detr_fast.predictor import Prediction, Predictor, PreparedImage

if TYPE_CHECKING:
    from detr_fast.video import Frame, VideoReader

# Frames that may wait for a part of the pipeline, beyond a batch. One of 4K takes 25 MB.
LOOK_AHEAD = 4


@dataclass
class VideoSummary:
    """What a run over a video did.

    Attributes:
        path: the video.
        picture, results: the video with drawings, and the JSON lines; None where the run failed.
        frames: how many were done.
        found: detections or segments in all of them.
        notes: what of the video was lost.
        failure: why there is no result, or "".
        speed: how fast it was, and what bounded it.
    """

    path: Path
    picture: Path | None = None
    results: Path | None = None
    frames: int = 0
    found: int = 0
    notes: list[str] = field(default_factory=list)
    failure: str = ""
    speed: Speed = field(default_factory=Speed)

    @property
    def ok(self) -> bool:
        """Whether the video was done; what it has lost stands in ``notes``."""
        return not self.failure

    def render(self) -> str:
        """Say it in a few lines."""
        if self.failure:
            return f"failed: {self.path}: {self.failure}"
        lines = [f"{self.found} found in {self.frames} frames, written to {self.picture} and {self.results}"]
        return "\n".join([*lines, self.speed.render(), *(f"{self.path}: {note}" for note in self.notes)])


def predict_videos(
    paths: Sequence[Path],
    predictor: Predictor,
    output: str | os.PathLike[str],
    *,
    every: int = 1,
    panoptic: float | None = None,
    on_progress: Callable[[Path, int], None] | None = None,
) -> list[VideoSummary]:
    """Detect the objects in the frames of videos, or divide them into segments, and write it to the folder ``output``.

    Each video gives ``<name>.mp4``, with the drawings, the times of the frames and no sound, and ``<name>.jsonl``, a
    line of JSON for each frame: ``frame`` (its number, from 0), ``time`` (seconds after the first frame), ``width``,
    ``height``, and ``detections`` or ``segments`` as in COCO's formats; with ``panoptic`` also a PNG for each frame,
    ``panoptic/<name>_<number>.png``. A second video of the same name becomes ``<name>_2``. Both files take their names
    when they are whole; until then, and of a run that is interrupted, they end with ``.partial.mp4`` and
    ``.partial.jsonl``.

    Frames are decoded and drawn beside the model, where it leaves cores for that.

    Args:
        paths: the videos. One that cannot be read is skipped, and its summary says why.
        predictor: its ``batch_size`` frames are run together.
        output: made where it is missing; files of an earlier run are replaced.
        every: take each so many-th frame; the others are in no result.
        panoptic: segments in place of boxes, of queries whose class is at least so probable.
        on_progress: called after each frame with the video and the number of its frames done.

    Raises:
        CheckpointError: ``output`` cannot be written; known before the first video is read.
        ValueError: an output would replace a video, or ``every`` is not positive.
        TypeError: segments are asked of a model without a mask head.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    folder = Path(output)
    stems = [folder / stem for stem in output_stems(list(paths))]
    _check_videos_survive(paths, stems)
    prepare_output_folder(folder)
    if panoptic is not None:
        predictor.things()  # what a panoptic segmentation lacks is said before the first video
        prepare_output_folder(folder / SEGMENTS)
    try:
        from detr_fast.video import VideoError
    except ModuleNotFoundError as error:
        return [VideoSummary(path, failure=str(error)) for path in paths]
    summaries = [VideoSummary(path) for path in paths]
    for summary, stem in zip(summaries, stems, strict=True):
        try:
            _Run(predictor, stem, every, panoptic, summary, on_progress or (lambda path, count: None))()
        except VideoError as error:
            summary.failure = str(error)
    return summaries


def _check_videos_survive(paths: Sequence[Path], stems: Sequence[Path]) -> None:
    outputs = {os.path.realpath(f"{stem}{ending}") for stem in stems for ending in (".mp4", ".partial.mp4")}
    for path in paths:
        if os.path.realpath(path) in outputs:
            raise ValueError(f"output must be another folder: {path} would be replaced by its drawing")


@dataclass
class _Found:
    """A frame on its way: what the model sees, what it found, and the drawing."""

    frame: Frame
    image: PreparedImage | None
    prediction: Prediction | PanopticPrediction | None = None
    drawn: Image.Image | None = None


@dataclass(frozen=True)
class _Run:
    """The way from a video to its results; all parts of it but ``_detect`` run in threads."""

    predictor: Predictor
    stem: Path
    every: int
    panoptic: float | None
    summary: VideoSummary
    on_progress: Callable[[Path, int], None]

    def __call__(self) -> None:
        from detr_fast.video import VideoReader

        summary = self.summary
        picture, results = self._named(".partial.mp4"), self._named(".partial.jsonl")
        with VideoReader(summary.path) as reader:
            try:
                self._write(reader, picture, results)
            finally:
                summary.speed.stop(summary.frames)
                if not summary.frames:
                    picture.unlink(missing_ok=True)
                    results.unlink(missing_ok=True)
            summary.notes = reader.lost()
        summary.picture = picture.replace(self._named(".mp4"))
        summary.results = results.replace(self._named(".jsonl"))

    def _named(self, ending: str) -> Path:
        # with_suffix would cut "clip.0001" short.
        return self.stem.with_name(self.stem.name + ending)

    def _write(self, reader: VideoReader, picture: Path, results: Path) -> None:
        from detr_fast.video import VideoWriter

        summary = self.summary
        with open(results, "w", encoding="utf-8") as lines, VideoWriter(picture, reader) as writer:

            def write(found: _Found) -> None:
                assert found.drawn is not None and found.prediction is not None
                writer.add(found.drawn, found.frame)
                lines.write(json.dumps(self._line(found.frame, found.prediction)) + "\n")
                summary.found += len(found.prediction)

            # Closed, so that its threads have ended before the files are, whatever stops the loop.
            with closing(self._steps(reader, write)) as steps:
                for summary.frames, _ in enumerate(steps, 1):
                    self.on_progress(summary.path, summary.frames)

    def _steps(self, reader: VideoReader, write: Callable[[_Found], None]) -> Generator[None, None, None]:
        """Do the frames, one a step."""
        most, speed = self.predictor.batch_size + LOOK_AHEAD, self.summary.speed
        with helpers(self.predictor.device) as pool, one_thread(pool) as decoder, one_thread(pool) as encoder:
            frames = ahead_in_order(islice(reader, 0, None, self.every), decoder, most)
            read = speed.timed("reading the video", ahead(self._read, frames, pool, most))
            drawn = ahead(self._draw, speed.timed("the model", self._detect(read)), pool, most)
            yield from speed.timed("writing results", ahead(write, drawn, encoder, most))

    def _read(self, frame: Frame) -> _Found:
        return _Found(frame, self.predictor.prepare(frame.picture()))

    def _detect(self, read: Iterable[_Found]) -> Iterator[_Found]:
        for batch in batches(read, self.predictor.batch_size):
            images = [found.image for found in batch if found.image is not None]
            for found, prediction in zip(batch, predict_batch(self.predictor, images, self.panoptic), strict=True):
                found.prediction = prediction
            yield from batch

    def _draw(self, found: _Found) -> _Found:
        assert found.image is not None and found.prediction is not None
        found.drawn = found.prediction.draw(found.image.picture, min_size=SMALLEST_PICTURE_PX)
        if isinstance(found.prediction, PanopticPrediction):
            png = found.prediction.png()
            write_whole(self._segments_png(found.frame), lambda partial: partial.write_bytes(png))
        found.image = None  # its pixels are as large as the rest together
        return found

    def _segments_png(self, frame: Frame) -> Path:
        return self.stem.parent / SEGMENTS / f"{self.stem.name}_{frame.number:06}.png"

    def _line(self, frame: Frame, prediction: Prediction | PanopticPrediction) -> dict[str, Any]:
        height, width = prediction.size
        line = {"frame": frame.number, "time": frame.time, "width": width, "height": height}
        if isinstance(prediction, PanopticPrediction):
            entry = prediction.to_coco(frame.number, self._segments_png(frame).name)
            entries, line["file_name"] = entry["segments_info"], entry["file_name"]
            kind = "segments"
        else:
            entries, kind = prediction.to_coco(frame.number), "detections"
        named = [
            {"category": name, **{key: value for key, value in entry.items() if key != "image_id"}}
            for name, entry in zip(prediction.names, entries, strict=True)
        ]
        return {**line, kind: named}


def predict_inputs(
    inputs: Inputs,
    predictor: Predictor,
    output: str | os.PathLike[str],
    *,
    recursive: bool = False,
    every: int = 1,
    panoptic: float | None = None,
    **of_images: Any,
) -> list[PredictSummary | VideoSummary]:
    """``predict_files`` for the images among the inputs and ``predict_videos`` for the videos.

    Args:
        inputs: files, folders and glob patterns, in any mixture.
        predictor, output, recursive, panoptic: as of ``predict_files``.
        every: as of ``predict_videos``.
        of_images: ``annotations`` and ``attention`` of ``predict_files``.

    Raises:
        ValueError: there are videos alone, and ``of_images`` asks for something; and as of the two.
    """
    images, videos = find_images_and_videos(inputs, recursive=recursive)
    asked = [name for name, value in of_images.items() if value]
    if asked and not images:
        raise ValueError(f"{asked[0]} is of images, and {videos[0]} is a video")
    summaries: list[PredictSummary | VideoSummary] = []
    if images:
        summaries.append(predict_files(images, predictor, output, panoptic=panoptic, **of_images))
    if videos:
        summaries += predict_videos(videos, predictor, output, every=every, panoptic=panoptic)
    return summaries
