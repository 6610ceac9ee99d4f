"""Pictures with labelled boxes: what is drawn where, on pictures of any size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from detr_fast.drawing import class_color, draw_boxes, line_width, text_color


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def colored(image: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """Where the picture has exactly this colour: [height, width] bool."""
    return (np.asarray(image) == color).all(-1)


def test_box_and_label_have_the_color_of_the_class() -> None:
    image = grey(300, 200)
    drawn = draw_boxes(image, torch.tensor([[50.0, 60.0, 250.0, 180.0]]), [7], ["dog"], [0.91])
    box = colored(drawn, class_color(7))
    assert all(box[y, x] for y, x in [(60, 50), (60, 250), (180, 50), (180, 250), (120, 50), (180, 150)])
    assert box[:60, 50:].sum() > 200, "the label stands on a filled ground above the box"
    assert not box[70:170, 60:240].any(), "the inside of the box stays visible"
    assert not box[:40].any() and not box[181:].any()
    assert colored(drawn, text_color(class_color(7)))[:60].sum() > 3, "the text is written on it"
    assert ImageChops.difference(image, grey(300, 200)).getbbox() is None, "the argument is not drawn on"


def test_text_shows_name_and_score() -> None:
    box = torch.tensor([[20.0, 60.0, 250.0, 180.0]])
    texts = [(["dog"], [0.91]), (["dog"], [0.19]), (["cat"], [0.91]), (["dog"], None)]
    pictures = [draw_boxes(grey(300, 200), box, [1], names, scores).tobytes() for names, scores in texts]
    assert len(set(pictures)) == len(texts)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (40, 12), (12, 40), (64, 64), (2000, 30), (30, 2000), (4000, 3000)])
@pytest.mark.parametrize("min_size", [0, 400])
def test_any_size(size: tuple[int, int], min_size: int) -> None:
    width, height = size
    boxes = torch.tensor([[0, 0, width, height], [0.6 * width, -5, width + 9, 0.3 * height]])
    drawn = draw_boxes(
        grey(*size), boxes, [1, 2], ["an unusually long category name", "b"], [0.5, 0.9], min_size=min_size
    )
    factor = drawn.width // width
    assert drawn.size == (factor * width, factor * height) and drawn.mode == "RGB"
    assert max(drawn.size) >= min_size and (factor == 1 or max(drawn.size) < 2 * max(min_size, 1))
    assert (colored(drawn, class_color(1)) | colored(drawn, class_color(2))).any()


@pytest.mark.parametrize("position", list(itertools.product((0.0, 0.4, 0.8), repeat=2)))
def test_label_lies_inside_the_picture_whole(position: tuple[float, float]) -> None:
    size = torch.tensor([400.0, 300.0])
    corner = torch.tensor(position) * size
    written = text_color(class_color(3))
    texts = []
    for at in (corner, 0.4 * size):
        drawn = draw_boxes(grey(400, 300), torch.cat((at, at + 0.2 * size))[None], [3], ["person"], [0.5])
        texts.append(colored(drawn, written).sum())
    assert texts[0] == texts[1] > 20, "as many letters as in the middle of the picture"


def test_font_shrinks_before_the_name_is_shortened() -> None:
    box = torch.tensor([[0.0, 20.0, 99.0, 99.0]])
    short = draw_boxes(grey(100, 100), box, [1], ["a"], [0.5])
    long = draw_boxes(grey(100, 100), box, [1], ["a name that is far too long for it"], [0.5])
    label_rows = [colored(picture, class_color(1))[:, 5].nonzero()[0] for picture in (short, long)]
    assert label_rows[0].min() < label_rows[1].min(), "the long label has the smaller font"


def test_labels_keep_clear_of_each_other() -> None:
    box = torch.tensor([[100.0, 100.0, 300.0, 200.0]])
    one = draw_boxes(grey(400, 300), box, [1], ["first"], [0.9])
    two = draw_boxes(grey(400, 300), box.repeat(2, 1), [1, 2], ["first", "other"], [0.9, 0.8])
    assert (colored(one, class_color(1))[:99] == colored(two, class_color(1))[:99]).all(), "the best label is whole"
    assert colored(two, class_color(2)).sum() > 200


def test_best_box_is_on_top() -> None:
    box = torch.tensor([[10.0, 40.0, 90.0, 90.0]]).repeat(2, 1)
    for scores, top in ([0.9, 0.8], 4), ([0.8, 0.9], 5):
        drawn = draw_boxes(grey(100, 100), box, [4, 5], ["a", "b"], scores)
        assert colored(drawn, class_color(top))[65, 90]


def test_degenerate_boxes() -> None:
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[5.0, 5, 5, 5], [9, 30, 3, 20], [-90, -90, -50, -50], [nan, 1, 5, 9], [0, 0, inf, 9]])
    drawn = draw_boxes(grey(60, 60), boxes, [1, 2, 3, 4, 5], list("abcde"))
    assert all(colored(drawn, class_color(label)).any() for label in (1, 2, 3)), "no area, swapped corners, outside"
    assert not any(colored(drawn, class_color(label)).any() for label in (4, 5))
    nothing = draw_boxes(grey(60, 60), torch.zeros(0, 4), [], [])
    assert ImageChops.difference(nothing, grey(60, 60)).getbbox() is None


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_any_mode(mode: str) -> None:
    drawn = draw_boxes(grey(50, 50).convert(mode), torch.tensor([[5.0, 20, 40, 40]]), [1], ["a"])
    assert drawn.mode == "RGB" and colored(drawn, class_color(1)).any()


def test_colors_tell_classes_apart() -> None:
    colors = np.array([class_color(label) for label in range(1, 91)]) / 255
    assert len({class_color(label) for label in range(91)}) == 91
    neighbours = np.abs(np.diff(colors, axis=0)).sum(1)
    assert neighbours.min() > 0.4
    assert text_color((255, 255, 0)) == (0, 0, 0) and text_color((0, 0, 160)) == (255, 255, 255)


def test_lines_grow_with_the_picture() -> None:
    assert line_width((32, 32)) == 1
    assert line_width((640, 480)) == 2
    assert line_width((6400, 4800)) == 22


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"boxes_xyxy_px must be \[N, 4\], got \(3, 5\)"):
        draw_boxes(grey(9, 9), torch.zeros(3, 5), [1] * 3, ["a"] * 3)
    with pytest.raises(ValueError, match="labels must have one entry for each of the 2 boxes, got 1"):
        draw_boxes(grey(9, 9), torch.zeros(2, 4), [1], ["a"] * 2)
    with pytest.raises(ValueError, match="scores must have one entry"):
        draw_boxes(grey(9, 9), torch.zeros(2, 4), [1, 2], ["a"] * 2, [0.5])
