"""Videos: their frames with times, turned upright, and what a damaged file loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="needs PyAV, which the test extra installs")

from detr_fast.video import Frame, VideoError, VideoReader, VideoWriter  # noqa: E402

MILLISECOND = Fraction(1, 1000)
GREEN, RED, BLUE = (0, 255, 0), (200, 0, 0), (0, 0, 255)


def scene(width: int, height: int) -> np.ndarray:
    """Red, with a green block in the top left corner and a blue one in the top right."""
    pixels = np.full((height, width, 3), RED, np.uint8)
    pixels[:16, :16], pixels[:16, -16:] = GREEN, BLUE
    return pixels


def make_video(
    path: Path,
    frames: int | Sequence[np.ndarray] = 10,
    *,
    stamps: Sequence[int] | None = None,
    rotation: int = 0,
    format: str | None = None,
) -> Path:
    """A video with stamps in milliseconds, by default 25 frames a second."""
    pictures = [scene(64, 48)] * frames if isinstance(frames, int) else frames
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "crf": "10", "g": "5"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = MILLISECOND
        if rotation and not hasattr(stream, "set_display_rotation"):
            pytest.skip("needs a PyAV that writes rotations")
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamps[number] if stamps else 40 * number, MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    return path


def read(path: Path) -> tuple[list[Frame], list[str]]:
    with VideoReader(path) as reader:
        frames = list(reader)
        return frames, reader.lost()


def assert_color(picture: Image.Image, place: tuple[int, int], color: tuple[int, int, int]) -> None:
    found = picture.getpixel(place)
    # Luma of 16 to 235, rounding, and quantization at high quality come to less.
    assert np.abs(np.subtract(found, color)).max() <= 12, f"{found} at {place}, expected {color}"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_times_of_a_variable_rate(tmp_path: Path, suffix: str) -> None:
    stamps = [100 + number**2 for number in range(12)]
    frames, lost = read(make_video(tmp_path / f"a{suffix}", 12, stamps=stamps))
    assert [frame.number for frame in frames] == list(range(12)) and not lost
    assert [round(1000 * frame.time) for frame in frames] == [number**2 for number in range(12)]


def test_times_where_the_file_has_none(tmp_path: Path) -> None:
    frames, _ = read(make_video(tmp_path / "a.h264", 6))
    steps = {round(later.time - earlier.time, 6) for earlier, later in zip(frames, frames[1:], strict=False)}
    assert len(frames) == 6 and frames[0].time == 0 and len(steps) == 1 and 0.01 < min(steps) < 0.1


def test_times_that_start_again_go_on(tmp_path: Path) -> None:
    """Two recordings in one transport stream, as where a receiver was interrupted."""
    parts = [make_video(tmp_path / f"{name}.ts", 10).read_bytes() for name in "ab"]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    frames, _ = read(tmp_path / "both.ts")
    times = np.array([frame.time for frame in frames])
    assert len(frames) == 20 and np.all(np.diff(times) > 0) and times[-1] < 2


@pytest.mark.parametrize(
    ("rotation", "size", "green", "blue"),
    [
        (0, (64, 48), (4, 4), (60, 4)),
        (90, (48, 64), (4, 60), (4, 4)),
        (-90, (48, 64), (44, 4), (44, 60)),
        (180, (64, 48), (60, 44), (4, 44)),
    ],
)
def test_turns_upright(
    tmp_path: Path, rotation: int, size: tuple[int, int], green: tuple[int, int], blue: tuple[int, int]
) -> None:
    frames, _ = read(make_video(tmp_path / "a.mp4", rotation=rotation))
    for picture in (frames[0].picture(), frames[-1].picture()):
        assert picture.size == size
        assert_color(picture, green, GREEN)
        assert_color(picture, blue, BLUE)


@pytest.mark.parametrize("size", [(64, 48), (63, 47), (1280, 720)])
def test_writes_what_it_reads(tmp_path: Path, size: tuple[int, int]) -> None:
    stamps = [0, 10, 500, 520, 2000]
    source = make_video(tmp_path / "a.mkv", [scene(64, 48)] * 5, stamps=stamps)
    with VideoReader(source) as reader, VideoWriter(tmp_path / "b.mp4", reader) as writer:
        for frame in reader:
            writer.add(Image.fromarray(scene(*size)), frame)
    frames, lost = read(tmp_path / "b.mp4")
    assert [round(1000 * frame.time) for frame in frames] == stamps and not lost
    picture = frames[-1].picture()
    assert picture.size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    for place, color in (((4, 4), GREEN), ((size[0] - 4, 4), BLUE), ((size[0] // 2, size[1] // 2), RED)):
        assert_color(picture, place, color)


def test_pictures_of_another_size_are_scaled(tmp_path: Path) -> None:
    source = make_video(tmp_path / "a.mp4", 2)
    with VideoReader(source) as reader, VideoWriter(tmp_path / "b.mp4", reader) as writer:
        for frame, size in zip(reader, [(64, 48), (128, 96)], strict=True):
            writer.add(Image.fromarray(scene(*size)), frame)
    frames, _ = read(tmp_path / "b.mp4")
    assert {frame.picture().size for frame in frames} == {(64, 48)} and len(frames) == 2


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    source = tmp_path / "a.mkv"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 15)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(64, 48), format="rgb24")))
        container.mux(stream.encode())
    with VideoReader(source) as reader, VideoWriter(tmp_path / "b.mp4", reader) as writer:
        for frame in reader:
            writer.add(frame.picture(), frame)
    with VideoReader(tmp_path / "b.mp4") as reader:
        assert reader.pixel_aspect == Fraction(16, 15)


def cut(path: Path, part: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


def noisy(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(number).integers(0, 256, (48, 64, 3)).astype(np.uint8) for number in range(count)]


def test_truncated(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", noisy(50))
    cut(path, 0.5)
    frames, lost = read(path)
    assert 15 < len(frames) < 35
    assert f"the last frame ends at {len(frames) / 25:.2f} s of the 2.00 s that the file announces" in "; ".join(lost)


def test_damaged_inside(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", noisy(50))
    content = bytearray(path.read_bytes())
    half, tenth = len(content) // 2, len(content) // 10
    content[half : half + tenth] = bytes(tenth)
    path.write_bytes(content)
    frames, lost = read(path)
    assert 35 < len(frames) < 50
    assert frames[-1].time == pytest.approx(49 / 25), "what comes after the damage is read, at its time"
    assert any("packets could not be decoded" in note for note in lost)


def without_index(path: Path) -> Path:
    """An MP4 whose recording was cut off: the index would come last."""
    cut(make_video(path, noisy(10)), 0.8)
    return path


def without_frames(path: Path) -> Path:
    """An MP4 with an index, and zeros for all that it points to."""
    content = make_video(path).read_bytes()
    start, end = content.index(b"mdat") + 4, content.rindex(b"moov") - 4
    path.write_bytes(content[:start] + bytes(end - start) + content[end:])
    return path


def with_noise(path: Path) -> Path:
    path.write_bytes(b"no video " * 1000)
    return path


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda path: path, "gone.mp4", r"video .*gone\.mp4 cannot be read: No such file"),
        (with_noise, "a.mp4", r"video .*a\.mp4 cannot be read: Invalid data"),
        (without_index, "a.mp4", r"video .*a\.mp4 cannot be read: Invalid data"),
        (make_sound, "a.wav", r"video .*a\.wav has no video stream"),
        (
            without_frames,
            "a.mp4",
            r"video .*a\.mp4 has no frame that can be decoded \(at least \d+ packets",
        ),
    ],
)
def test_files_that_are_no_video(tmp_path: Path, make: Callable[[Path], Path], name: str, message: str) -> None:
    path = make(tmp_path / name)
    with pytest.raises(VideoError, match=message):
        read(path)


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")

    class Cover:
        disposition = av.stream.Disposition.attached_pic

    class Container:
        streams: Any = type("Streams", (), {"best": staticmethod(lambda kind: Cover())})

        def close(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(av, "open", lambda path: Container())
        with pytest.raises(VideoError, match="has no video stream"):
            VideoReader(path)


def test_a_video_that_cannot_be_written(tmp_path: Path) -> None:
    source, target = make_video(tmp_path / "a.mp4"), tmp_path / "missing" / "b.mp4"
    with (
        pytest.raises(VideoError, match=r"video .*b\.mp4 cannot be written: No such file"),
        VideoReader(source) as reader,
        VideoWriter(target, reader) as writer,
    ):
        for frame in reader:
            writer.add(frame.picture(), frame)
