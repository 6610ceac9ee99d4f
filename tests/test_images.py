"""Reading image files: every mode comes out as upright 8-bit RGB, and a broken file is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from detr_fast.data.images import ImageError, load_image, to_rgb


def save_with_orientation(path: Path, orientation: int) -> None:
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "PA", "La", "RGBa", "I", "F", "I;16"]
)
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = to_rgb(Image.new(mode, (5, 3)))
    assert image.mode == "RGB"
    assert image.size == (5, 3)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (3, 1)), (6, (1, 0)), (8, (0, 3))])
def test_exif_orientation_turns_the_picture(tmp_path: Path, orientation: int, corner: tuple[int, int]) -> None:
    save_with_orientation(tmp_path / "a.png", orientation)
    image = load_image(tmp_path / "a.png")
    assert image.size == ((2, 4) if orientation >= 5 else (4, 2))
    assert image.getpixel(corner) == (255, 255, 255)
    assert np.asarray(image).sum() == 3 * 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_agree_with_pillow(tmp_path: Path, orientation: int) -> None:
    save_with_orientation(tmp_path / "a.png", orientation)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(expected))


def test_damaged_exif_does_not_lose_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (4, 2), "white").save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage that is no TIFF header")
    assert load_image(tmp_path / "a.jpg").size == (4, 2)


def test_quarter_turn_is_left_out_where_the_annotations_were_made_without_it(tmp_path: Path) -> None:
    save_with_orientation(tmp_path / "a.png", 6)
    assert load_image(tmp_path / "a.png", annotated_size=(4, 2)).size == (4, 2)
    assert load_image(tmp_path / "a.png", annotated_size=(2, 4)).size == (2, 4)
    assert load_image(tmp_path / "a.png", annotated_size=(7, 7)).size == (2, 4)


def test_half_turn_does_not_depend_on_the_annotated_size(tmp_path: Path) -> None:
    save_with_orientation(tmp_path / "a.png", 3)
    assert load_image(tmp_path / "a.png", annotated_size=(4, 2)).getpixel((3, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (2, 2), 0).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_shows_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 0)) == (200, 100, 50)


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_32_bit_integers_of_8_bit_range_stay() -> None:
    assert to_rgb(Image.fromarray(np.array([[7, 255]], dtype=np.int32))).getpixel((0, 0)) == (7, 7, 7)


def test_float_grey() -> None:
    assert to_rgb(Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32))).getpixel((1, 0)) == (255, 255, 255)
    wide = to_rgb(Image.fromarray(np.array([[np.nan, 100.0, 300.0]], dtype=np.float32)))
    assert np.asarray(wide)[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = load_image(tmp_path / "a.jpg").getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.jpg does not exist"):
        load_image(tmp_path / "absent.jpg")


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    Image.fromarray(np.random.randint(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ImageError, match=r"half\.jpg cannot be read.*truncated"):
        load_image(path)


@pytest.mark.parametrize("contents", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"\xff\xd8\xff\xe0" * 9])
def test_foreign_file_is_named(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "foreign.png"
    path.write_bytes(contents)
    with pytest.raises(ImageError, match=r"foreign\.png cannot be read"):
        load_image(path)


def test_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path)


def test_real_images_all_load(shared_data: Path) -> None:
    paths = sorted((shared_data / "coco200" / "images").rglob("*.jpg")) + sorted((shared_data / "bccd").rglob("*.jpg"))
    assert len(paths) == 564
    for path in paths:
        image = load_image(path)
        assert image.mode == "RGB"
        assert min(image.size) > 50
