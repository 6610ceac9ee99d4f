"""Image files of any kind as 8-bit RGB pictures, upright."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

# Modes that hold more than 8 bits a channel; a plain convert("RGB") would clip them to white.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_EXIF_ORIENTATION = 0x0112
# What brings a picture of each EXIF orientation upright; 1 is upright.
_UPRIGHT_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# How many times as large as needed a JPEG that is decoded at reduced size still is. Resized bilinearly, its pixels then
# differ from those of the whole picture by 1.1 of 255 on average (worst of 24 photographs: 2.0); by 0.5 at 3 times, 1.4
# at 1.5 times, 3.4 at 1 time.
REDUCED_IS_LARGER = 2


class ImageError(ValueError):
    """A file that is missing, or that cannot be decoded as an image; the message names it."""


def load_image(path: str | os.PathLike[str], *, annotated_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, turned upright by its EXIF orientation.

    Transparent pixels show white. 16-bit grey is scaled by its full range (65535 is white); floating-point grey is
    taken as [0, 1] where no value is above 1, else as [0, 255].

    Args:
        path: any format that Pillow reads; of an animation, the first frame.
        annotated_size: (width, height) that the annotations were made for. An EXIF turn by a quarter is left out where
            the file fits this size only unturned, because the boxes then belong to the unturned picture.

    Raises:
        ImageError: the file is missing, no image, truncated or damaged.
    """
    return load_reduced(path, None, annotated_size=annotated_size)[0]


def load_reduced(
    path: str | os.PathLike[str], shortest: int | None, *, annotated_size: tuple[int, int] | None = None
) -> tuple[Image.Image, int]:
    """``load_image`` for a picture that will be scaled down: a large JPEG is decoded at a half, quarter or eighth.

    That is so where its sides are multiples of the divisor, so that no box moves, and what is left is
    ``REDUCED_IS_LARGER`` times as large as needed.

    Args:
        path, annotated_size: as in ``load_image``; ``annotated_size`` is that of the whole picture.
        shortest: pixels of the shortest side that are needed; None decodes the whole picture.

    Returns:
        The picture, and the divisor of its sides: 1, 2, 4 or 8.

    Raises:
        ImageError: the file is missing, no image, truncated or damaged.
    """
    try:
        with Image.open(path) as image:
            turn = _turn(image, annotated_size)
            divisor = 1 if shortest is None else _reduce(image, shortest)
            image.load()
            return to_rgb(image if turn is None else image.transpose(turn)), divisor
    except FileNotFoundError as error:
        raise ImageError(f"image {Path(path)} does not exist") from error
    # Pillow's decoders raise SyntaxError, struct.error, IndexError and others besides OSError on damaged files.
    except Exception as error:
        raise ImageError(f"image {Path(path)} cannot be read: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any Pillow mode as 8-bit RGB; transparent pixels show white."""
    if image.mode in _DEEP_MODES:
        return _deep_grey_to_8_bit(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _over_white(image)
    return image.convert("RGB")


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened picture, 1 to 8; from 5 on, upright exchanges width and height."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    # A damaged EXIF block says nothing about the pixels, and viewers show such pictures as they are.
    except Exception:
        return 1
    return value if value in _UPRIGHT_TURNS else 1


def _turn(image: Image.Image, annotated_size: tuple[int, int] | None) -> Image.Transpose | None:
    """What brings an opened picture upright, None where it is."""
    orientation = exif_orientation(image)
    width, height = image.size
    boxes_are_unturned = orientation >= 5 and width != height and annotated_size == (width, height)
    return None if orientation == 1 or boxes_are_unturned else _UPRIGHT_TURNS[orientation]


def _reduce(image: Image.Image, shortest: int) -> int:
    """Have an opened picture decoded at reduced size, where its format can; the divisor of its sides."""
    width, height = image.size
    for divisor in (8, 4, 2):
        divides = width % divisor == height % divisor == 0
        if divides and min(width, height) >= divisor * REDUCED_IS_LARGER * shortest:
            return 1 if image.draft(None, (width // divisor, height // divisor)) is None else divisor
    return 1


def _over_white(image: Image.Image) -> Image.Image:
    # Premultiplied modes convert to their plain twin only.
    plain = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
    rgba = image.convert(plain).convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(canvas, rgba).convert("RGB")


def _deep_grey_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F":
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
    else:
        # Mode "I" (32-bit) also comes from 8-bit files; only values above 255 show that the range is 16 bits.
        is_8_bit = image.mode == "I" and values.max(initial=0.0) <= 255
        scale = 1.0 if is_8_bit else 255 / 65535
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
