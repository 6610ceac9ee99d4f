"""Video files: their frames as upright pictures with time stamps, and pictures as a video. It needs PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

try:
    import av
    from av.video.reformatter import Colorspace
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: a video needs PyAV, pip install 'detr_fast[video]'") from error

# A file that has no rate of its own, such as a bare stream of H.264.
USUAL_RATE = Fraction(25)
# What a file announces and where its last frame ends differ by so much, in seconds, without anything being lost.
END_SLACK = 0.5
# H.264's quality from 0 to 51; at 20 edges of boxes and letters are clean.
QUALITY = {"crf": "20", "preset": "veryfast"}
# What brings a picture upright, by its counterclockwise rotation in degrees.
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
# The codes of ITU-T H.273 for the colours that players assume of a large video, and for 16 to 235 as the range of luma.
_BT709 = 1
_LIMITED_RANGE = 1


class VideoError(ValueError):
    """A file that is missing or no video, or a video that cannot be decoded or encoded; the message names it."""


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        number: counted from 0, of the frames that could be decoded.
        ticks: its time in units of the video's ``time_base``, from the first frame on.
        time: the same in seconds.
        decoded: the pixels, in the video's own format and not turned.
    """

    number: int
    ticks: int
    time: float
    decoded: av.VideoFrame

    def picture(self) -> Image.Image:
        """8-bit RGB, turned upright by the video's rotation."""
        turn = _TURNS.get(self.decoded.rotation % 360)
        picture = self.decoded.to_image()
        return picture if turn is None else picture.transpose(turn)


class VideoReader:
    """The frames of a video file's best video stream, once, in the order of their time.

    Times are kept as they are, of a variable rate too; where a frame has none, or one that is not after the frame
    before it, it comes one frame later at the usual rate, and what follows is moved with it.

    Raises:
        VideoError: the file cannot be opened or has no video stream; while iterating: it has not a single frame.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._container = av.open(os.fspath(path))
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"video {path} cannot be read: {_reason(error)}") from error
        stream = self._container.streams.best("video")
        # The cover of an audio file is a video stream of one picture.
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            self._container.close()
            raise VideoError(f"video {path} has no video stream")
        self._stream: Any = stream
        self._stream.codec_context.thread_type = "AUTO"
        self.rate: Fraction = stream.average_rate or stream.guessed_rate or USUAL_RATE
        self.time_base: Fraction = stream.time_base or 1 / self.rate
        self._step = max(1, round(1 / (self.rate * self.time_base)))
        self._lost_packets = self._damaged = 0
        self._stopped_by = ""
        self._end = 0.0

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel of the coded (not turned) frame to its height."""
        return self._stream.sample_aspect_ratio or Fraction(1)

    def __iter__(self) -> Iterator[Frame]:
        first = previous = shift = 0
        number = -1
        for number, decoded in enumerate(self._decode()):
            stamp = decoded.pts
            if number == 0:
                ticks = first = stamp or 0
            elif stamp is not None and stamp + shift > previous:
                ticks = stamp + shift
            else:
                ticks = previous + self._step
                shift = shift if stamp is None else ticks - stamp
            previous = ticks
            self._end = float((ticks - first + (decoded.duration or self._step)) * self.time_base)
            yield Frame(number, ticks - first, float((ticks - first) * self.time_base), decoded)
        if number < 0:
            raise VideoError(f"video {self.path} has no frame that can be decoded" + self._because())

    def lost(self) -> list[str]:
        """What of the file could not be used, in words; whole after the last frame."""
        notes = [f"reading stopped early: {self._stopped_by}"] if self._stopped_by else []
        if self._lost_packets:
            # A decoder of several threads reports one error for the packets that it had begun.
            notes.append(f"at least {self._lost_packets} packets could not be decoded, and have no frames")
        if self._damaged:
            notes.append(f"{self._damaged} frames are damaged")
        announced = self._announced()
        if announced - self._end > END_SLACK:
            notes.append(f"the last frame ends at {self._end:.2f} s of the {announced:.2f} s that the file announces")
        return notes

    def _announced(self) -> float:
        """Seconds that the file says it has; 0 where it does not say it."""
        if self._stream.duration is not None:
            return float(self._stream.duration * self._stream.time_base)
        return (self._container.duration or 0) / av.time_base

    def _because(self) -> str:
        return f" ({'; '.join(self.lost())})" if self.lost() else ""

    def _decode(self) -> Iterator[av.VideoFrame]:
        """The frames that can be decoded; a damaged packet is counted, and a damaged file ends there."""
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)
            except av.FFmpegError:
                self._lost_packets += 1
                continue
            for frame in frames:
                self._damaged += frame.is_corrupt
                yield frame

    def _packets(self) -> Iterator[av.Packet]:
        try:
            yield from self._container.demux(self._stream)
        except av.FFmpegError as error:
            self._stopped_by = _reason(error)


class VideoWriter:
    """An MP4 file with H.264 in it, of pictures with time stamps; the first one's size is the video's.

    Sides become even, as the format wants them, by repeating the last row or column.

    Args:
        path: the file; ``close`` completes it.
        reader: gives the rate, the unit of time and the shape of pixels.

    Raises:
        VideoError: from ``add`` and ``close``: the file cannot be written, or the pictures not be encoded.
    """

    def __init__(self, path: Path, reader: VideoReader) -> None:
        self._path, self._reader = path, reader
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, picture: Image.Image, frame: Frame) -> None:
        """Append a picture of the frame, of any size."""
        try:
            if self._container is None:
                self._open(picture, frame)
            if (size := (self._stream.width, self._stream.height)) != _even(picture.size):
                picture = picture.resize(size)
            self._encode(_even_frame(picture), frame.ticks)
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"video {self._path} cannot be written: {_reason(error)}") from error

    def close(self) -> None:
        """Write what the encoder still holds and the index; a file without a picture is none."""
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            try:
                container.mux(self._stream.encode())
            finally:
                container.close()
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"video {self._path} cannot be written: {_reason(error)}") from error

    def _open(self, picture: Image.Image, frame: Frame) -> None:
        # The index at the start, so that a player can begin before it has the whole file.
        self._container = av.open(os.fspath(self._path), "w", format="mp4", options={"movflags": "faststart"})
        stream = self._container.add_stream("libx264", rate=self._reader.rate, options=QUALITY)
        stream.width, stream.height = _even(picture.size)
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.time_base = self._reader.time_base
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        aspect = self._reader.pixel_aspect
        codec.sample_aspect_ratio = 1 / aspect if frame.decoded.rotation % 180 else aspect
        self._stream = stream

    def _encode(self, pixels: np.ndarray[Any, Any], ticks: int) -> None:
        decoded = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        encoded = decoded.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
        encoded.pts, encoded.time_base = ticks, self._reader.time_base
        self._container.mux(self._stream.encode(encoded))


def _even(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] + size[0] % 2, size[1] + size[1] % 2


def _even_frame(picture: Image.Image) -> np.ndarray[Any, Any]:
    """[height, width, 3] uint8 with even sides."""
    pixels = np.asarray(picture)
    return np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
