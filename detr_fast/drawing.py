"""Pictures of detections: boxes or segments with legible labels, drawn with Pillow alone.

Text is set in DejaVu Sans, which comes with matplotlib, so no font has to be installed on the machine.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Below 7 px DejaVu Sans has no readable lower case.
SMALLEST_FONT_PX = 7
# Neighbouring ids land far apart on the colour circle when each turns it by the golden ratio.
GOLDEN_RATIO = 0.6180339887498949
# Of a segment's colour; the rest is the picture's.
SEGMENT_SHARE = 0.55

Color = tuple[int, int, int]


class Rect(NamedTuple):
    """A rectangle of whole pixels, both corners inside it."""

    left: int
    top: int
    right: int
    bottom: int

    def overlap(self, other: Rect) -> int:
        """Pixels that both rectangles cover."""
        width = min(self.right, other.right) - max(self.left, other.left) + 1
        height = min(self.bottom, other.bottom) - max(self.top, other.top) + 1
        return max(width, 0) * max(height, 0)


class Label(NamedTuple):
    """A text that fits the picture, and where it stands."""

    text: str
    font: ImageFont.FreeTypeFont
    place: Rect


def class_color(label: int) -> Color:
    """Give the RGB colour (0..255) of a class: the same in every picture, and unlike that of the next ids."""
    hue = (0.05 + label * GOLDEN_RATIO) % 1.0
    saturation = (0.85, 0.65, 1.0)[label % 3]
    value = (0.95, 1.0, 0.8)[label // 3 % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def text_color(background: Color) -> Color:
    """Give black or white, whichever stands out more from ``background`` (WCAG 2 relative luminance)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Contrast with white equals contrast with black at sqrt(1.05 * 0.05) - 0.05.
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def line_width(size: tuple[int, int]) -> int:
    """Give the width of a box's line in pixels for a picture of ``size`` (width, height)."""
    return max(1, round(math.sqrt(size[0] * size[1]) / 250))


def draw_boxes(
    image: Image.Image,
    boxes_xyxy_px: Tensor,
    labels: Sequence[int],
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    min_size: int = 0,
) -> Image.Image:
    """Draw labelled boxes on a copy of ``image``.

    Boxes are cut at the picture's edge and may have no area; one with a NaN or infinite corner is left out. A label
    stands above its box, or wherever near it fewest other labels are covered, and always inside the picture: its font
    shrinks and then its name is shortened until it fits, and where not one letter fits only the box is drawn.

    Args:
        image: any mode; it is not changed.
        boxes_xyxy_px: [N, 4], corners in pixels of ``image``.
        labels: N class ids, which choose the colours.
        names: N names.
        scores: N scores in [0, 1], or None for names alone (ground truth). The highest is drawn on top.
        min_size: a picture whose longer side has fewer pixels is enlarged by a whole factor to at least that many, so
            that labels can be read on it.

    Returns:
        An RGB picture, of the size of ``image`` unless ``min_size`` enlarged it.

    Raises:
        ValueError: shapes or counts are not as above.
    """
    _check_boxes(boxes_xyxy_px, labels, names, scores)
    factor = max(1, math.ceil(min_size / max(image.size)))
    canvas = image.convert("RGB")
    if factor > 1:
        canvas = canvas.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    rects = _pixel_rects(boxes_xyxy_px * factor, canvas.size)
    order = sorted(rects, key=lambda i: 0.0 if scores is None else float(scores[i]))
    draw = ImageDraw.Draw(canvas)
    width = line_width(canvas.size)
    for i in order:
        draw.rectangle(rects[i], outline=class_color(int(labels[i])), width=width)
    placed: dict[int, Label] = {}
    # The best detection chooses its place first, and is written last: no other label covers it.
    for i in reversed(order):
        text = names[i] if scores is None else f"{names[i]} {scores[i]:.2f}"
        label = _place_label(text, rects[i], canvas.size, [other.place for other in placed.values()])
        if label is not None:
            placed[i] = label
    for i in reversed(placed):
        _draw_label(draw, placed[i], class_color(int(labels[i])))
    return canvas


def draw_segments(
    image: Image.Image,
    ids: np.ndarray,
    segments: Sequence[int],
    labels: Sequence[int],
    names: Sequence[str],
    *,
    min_size: int = 0,
) -> Image.Image:
    """Tint and outline segments on a copy of ``image``, each with its name where it is widest.

    Segments of one class have neighbouring tints of its colour. Labels as of ``draw_boxes``.

    Args:
        image: any mode; it is not changed.
        ids: [height, width] of ``image``, the segment of each pixel; what is in none of ``segments`` stays as it is.
        segments: N different ids.
        labels: N class ids, which choose the colours.
        names: N names.
        min_size: as of ``draw_boxes``.

    Raises:
        ValueError: shapes or counts are not as above.
    """
    if ids.shape != (image.height, image.width) or not len(segments) == len(labels) == len(names):
        counts = f"{list(ids.shape)}, {len(segments)} segments, {len(labels)} labels, {len(names)} names"
        raise ValueError(f"ids must be [{image.height}, {image.width}], with a label and name each, got {counts}")
    factor = max(1, math.ceil(min_size / max(image.size)))
    size = (image.width * factor, image.height * factor)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)).copy()
    large = ids.repeat(factor, 0).repeat(factor, 1)
    before = [list(labels[:i]).count(label) for i, label in enumerate(labels)]
    colors = [_tint(class_color(int(label)), number) for label, number in zip(labels, before, strict=True)]
    outlines = _outlines(large, line_width(size))
    for segment, color in zip(segments, colors, strict=True):
        inside = large == segment
        pixels[inside] = pixels[inside] * (1 - SEGMENT_SHARE) + np.array(color) * SEGMENT_SHARE
        pixels[inside & outlines] = color
    canvas = Image.fromarray(pixels)
    draw, placed = ImageDraw.Draw(canvas), list[Rect]()
    for segment, name, color in sorted(zip(segments, names, colors, strict=True), key=lambda x: -(ids == x[0]).sum()):
        if (at := _widest_place(ids == segment, factor)) is not None:
            label = _place_label(name, at, size, placed)
            if label is not None:
                placed.append(label.place)
                _draw_label(draw, label, color)
    return canvas


def contact_sheet(pictures: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Lay out pictures, all of the first one's size, on one sheet, ``columns`` to a row."""
    width, height = pictures[0].size
    rows, across, down = math.ceil(len(pictures) / columns), width + gap, height + gap
    sheet = Image.new("RGB", (columns * across - gap, rows * down - gap), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * across, place // columns * down))
    return sheet


def _tint(color: Color, number: int) -> Color:
    """Lighter or darker from one segment of a class to the next."""
    share = (0.0, 0.25, -0.25, 0.45, -0.4)[number % 5]
    red, green, blue = (round(c + (255 - c) * share if share > 0 else c * (1 + share)) for c in color)
    return red, green, blue


def _outlines(ids: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a segment next to another, in lines of ``width`` pixels on either side."""
    edges = np.zeros(ids.shape, dtype=bool)
    for step in range(1, width + 1):
        across, down = ids[:, step:] != ids[:, :-step], ids[step:] != ids[:-step]
        edges[:, step:] |= across
        edges[:, :-step] |= across
        edges[step:] |= down
        edges[:-step] |= down
    return edges


def _widest_place(mask: np.ndarray, factor: int) -> Rect | None:
    """A pixel, times ``factor``, that is among the last of ``mask`` when it is eroded; None where it is empty."""
    step = max(1, max(mask.shape) // 128)
    left = np.pad(mask[::step, ::step], 1)
    if not left.any():  # too thin to be met in steps
        step, left = 1, np.pad(mask, 1)
    if not left.any():
        return None
    while (inner := _eroded(left)).any():
        left = inner
    rows, columns = np.nonzero(left)
    middle = len(rows) // 2
    x, y = ((int(i[middle]) - 1) * step * factor for i in (columns, rows))
    return Rect(x, y, x, y)


def _eroded(mask: np.ndarray) -> np.ndarray:
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


def _check_boxes(boxes: Tensor, labels: Sequence[int], names: Sequence[str], scores: Sequence[float] | None) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes_xyxy_px must be [N, 4], got {tuple(boxes.shape)}")
    for name, values in (("labels", labels), ("names", names), ("scores", scores)):
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"{name} must have one entry for each of the {len(boxes)} boxes, got {len(values)}")


def _pixel_rects(boxes_xyxy_px: Tensor, size: tuple[int, int]) -> dict[int, Rect]:
    """Give the rectangles to draw, by box number; boxes with NaN or infinite corners have none."""
    width, height = size
    rects = {}
    for i, box in enumerate(boxes_xyxy_px.detach().to("cpu", torch.float64).tolist()):
        if not all(map(math.isfinite, box)):
            continue
        xs = sorted(min(max(round(x), 0), width - 1) for x in box[0::2])
        ys = sorted(min(max(round(y), 0), height - 1) for y in box[1::2])
        rects[i] = Rect(xs[0], ys[0], xs[1], ys[1])
    return rects


@lru_cache(maxsize=1)
def _font_file() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@lru_cache(maxsize=64)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size_px)


def _place_label(text: str, rect: Rect, size: tuple[int, int], taken: Sequence[Rect]) -> Label | None:
    """Choose font and place of a label near ``rect``; None where not one letter fits in the picture."""
    fitted = _fit_text(text, size)
    if fitted is None:
        return None
    text, font = fitted
    text_width, text_height, pad = _text_size(text, font)
    spots = _places(rect, (text_width + 2 * pad, text_height + 2 * pad), size)
    return Label(text, font, min(spots, key=lambda spot: sum(map(spot.overlap, taken))))


def _draw_label(draw: ImageDraw.ImageDraw, label: Label, color: Color) -> None:
    draw.rectangle(label.place, fill=color)
    _, _, pad = _text_size(label.text, label.font)
    ascent, _ = label.font.getmetrics()
    baseline = (label.place.left + pad, label.place.top + pad + ascent)
    draw.text(baseline, label.text, fill=text_color(color), font=label.font, anchor="ls")


def _text_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int, int]:
    """Give width, line height and the padding around them in pixels."""
    ascent, descent = font.getmetrics()
    return math.ceil(font.getlength(text)), ascent + descent, max(1, round(font.size / 8))


def _fit_text(text: str, size: tuple[int, int]) -> tuple[str, ImageFont.FreeTypeFont] | None:
    """Choose the largest font up to the picture's usual one in which ``text`` fits, then shorten the text."""
    usual = max(11, round(math.sqrt(size[0] * size[1]) / 45))
    text = " ".join(text.split())
    for size_px in range(usual, SMALLEST_FONT_PX - 1, -max(1, usual // 12)):
        if _fits(text, _font(size_px), size):
            return text, _font(size_px)
    font = _font(SMALLEST_FONT_PX)
    # A long name loses letters before the score, which is its last word, is lost.
    name, _, score = text.rpartition(" ")
    shortened = [f"{name[:n]}… {score}" for n in range(len(name) - 1, 0, -1)]
    shortened += [f"{text[:n]}…" for n in range(len(text) - 1, 0, -1)]
    return next(((short, font) for short in shortened if _fits(short, font, size)), None)


def _fits(text: str, font: ImageFont.FreeTypeFont, size: tuple[int, int]) -> bool:
    text_width, text_height, pad = _text_size(text, font)
    # A label that covers more than half of the picture's height hides what it names.
    return text_width + 2 * pad <= size[0] and text_height + 2 * pad <= max(size[1] // 2, 1)


def _places(rect: Rect, label_size: tuple[int, int], size: tuple[int, int]) -> Iterator[Rect]:
    """Yield where a label may stand, best first: above its box, inside at the top, below, inside at the bottom."""
    width, height = label_size
    lefts = (rect.left, rect.right - width + 1)
    tops = (rect.top - height, rect.top, rect.bottom + 1, rect.bottom - height + 1)
    for top in tops:
        for left in lefts:
            x = min(max(left, 0), size[0] - width)
            y = min(max(top, 0), size[1] - height)
            yield Rect(x, y, x + width - 1, y + height - 1)
