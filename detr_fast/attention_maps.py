"""What a Detr looks at: the maps of the paper's attention figures, and those figures drawn.

The decoder's map of a detection shows which places of the image its query read; the encoder's map of a point shows
which places that point's token read (Carion et al. 2020, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from detr_fast.drawing import class_color, draw_boxes
from detr_fast.graphed_inference import without_graphs
from detr_fast.models.tokens import TokenLayout
from detr_fast.ops import attention_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from detr_fast.predictor import Prediction

# A figure shows its image smaller than this; more pixels would only make the file larger.
FIGURE_IMAGE_PX = 1000


class PointError(ValueError):
    """A point that lies outside the image; the message says which."""


@dataclass
class AttentionInputs:
    """What an attention layer was called with, for B images."""

    query: Tensor  # [Nq, H, E]
    key: Tensor  # [Nk, H, E]
    query_layout: TokenLayout
    key_layout: TokenLayout

    def maps(self, cells: Tensor) -> Tensor:
        """Where the queries at ``cells`` [N] (row * w + column) look, mean over the heads: [B, N, h, w]."""
        (query, query_layout), (key, key_layout) = self._of_valid_tokens()
        tokens = query_layout.tokens_at(cells.to(query.device))  # [B, N]
        chosen = list(tokens.clamp(min=0))
        assert query_layout.offsets is not None and key_layout.offsets is not None  # no graph is traced here
        weights = attention_weights(query, key, query_layout.offsets, key_layout.offsets, queries=chosen)
        maps = key_layout.unpack(torch.cat([image.mean(0) for image in weights], dim=1).T)  # [B, N, h, w]
        return maps.masked_fill((tokens < 0)[:, :, None, None], 0)

    def _of_valid_tokens(self) -> list[tuple[Tensor, TokenLayout]]:
        """Query and key without tokens that stand for padding; where there are such, it waits for the device."""
        pairs = [(self.query, self.query_layout), (self.key, self.key_layout)]
        return [(x, layout) if layout.padding is None else layout.without_padding(x) for x, layout in pairs]


@dataclass
class AttentionCapture:
    """The inputs of a model's last encoder and decoder attention in its latest forward pass."""

    inputs: dict[str, AttentionInputs] = field(default_factory=dict)

    @property
    def feature_size(self) -> tuple[int, int]:
        """Rows and columns of the feature map, with its padding."""
        return self._inputs("encoder").key_layout.frame

    def decoder_maps(self, queries: Tensor) -> Tensor:
        """Give the cross-attention of the queries [N] in the last decoder layer, mean over heads: [B, N, h, w]."""
        return self._inputs("decoder").maps(queries)

    def encoder_maps(self, tokens: Tensor) -> Tensor:
        """Give the self-attention of the tokens [N] (row * w + column) in the last encoder layer: [B, N, h, w].

        The map of a token is zero in an image where that place is padding.
        """
        return self._inputs("encoder").maps(tokens)

    def _inputs(self, part: str) -> AttentionInputs:
        if part not in self.inputs:
            raise RuntimeError(f"no {part} attention was captured: run the model inside capture_attention first")
        return self.inputs[part]


@contextmanager
def capture_attention(model: nn.Module) -> Iterator[AttentionCapture]:
    """Keep the inputs of a Detr's last attention layers while it runs; maps are computed from them when asked for.

    The hooks are gone when the context is left, by an error too. The maps cost nothing until they are asked for: only
    the rows of the queries or points in question are computed.

    Raises:
        TypeError: ``model`` does not have a Detr's layers.
    """
    layers = _attention_layers(model)
    capture = AttentionCapture()
    handles = [layer.register_forward_pre_hook(_keep_inputs(capture, part)) for part, layer in layers.items()]
    try:
        with without_graphs():
            yield capture
    finally:
        for handle in handles:
            handle.remove()


def _attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    try:
        model.get_submodule("input_proj")  # others have such layers, too, and call them in another way
        encoder = list(model.get_submodule("transformer.encoder.layers").children())
        decoder = list(model.get_submodule("transformer.decoder.layers").children())
        return {
            "encoder": encoder[-1].get_submodule("self_attn"),
            "decoder": decoder[-1].get_submodule("multihead_attn"),
        }
    except (AttributeError, IndexError) as error:
        raise TypeError(
            f"model must be a Detr with at least one encoder and one decoder layer, got {type(model).__name__}: {error}"
        ) from error


def _keep_inputs(capture: AttentionCapture, part: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        query, key, _, query_layout, key_layout = args
        capture.inputs[part] = AttentionInputs(query, key, query_layout, key_layout)

    return hook


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one image; ``h`` x ``w`` is the size of the model's feature map.

    Attributes:
        image: the RGB picture.
        prediction: the detections in question, best first.
        decoder: [N, h, w] float32, one map a detection, each with sum 1.
        points_px: P points (x, y) in pixels of ``image``.
        encoder: [P, h, w] float32, one map a point, each with sum 1.
    """

    image: Image.Image
    prediction: Prediction
    decoder: Tensor
    points_px: list[tuple[float, float]]
    encoder: Tensor


def point_tokens(
    points_px: Sequence[tuple[float, float]], size: tuple[int, int], feature_size: tuple[int, int]
) -> Tensor:
    """Give the [P] int64 tokens under points (x, y) in pixels of an image of ``size`` (height, width).

    Raises:
        PointError: a point lies outside the image.
    """
    height, width = size
    rows, columns = feature_size
    tokens = []
    for x, y in points_px:
        if not (0 <= x <= width and 0 <= y <= height):
            raise PointError(f"points must lie inside the image of {width}x{height} pixels, got ({x:g}, {y:g})")
        row = min(int(y / height * rows), rows - 1)
        tokens.append(row * columns + min(int(x / width * columns), columns - 1))
    return torch.tensor(tokens, dtype=torch.int64)


def draw_attention(maps: AttentionMaps, path: str | Path | None = None) -> Figure:
    """Draw one figure of an image's attention, and write it as PNG where ``path`` is given.

    Left the image with its detections and numbered points; above, for each detection, the decoder's attention with the
    detection's box; below, for each point, the encoder's self-attention. Each map is scaled to its own maximum.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(maps.decoder), len(maps.encoder), 1)
    aspect = min(max(maps.image.height / maps.image.width, 0.4), 2.0)
    # A tile is three inches wide; the image on the left is as high as the two rows of tiles.
    figure = Figure(figsize=(6 + 3 * columns, 6 * aspect + 0.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, columns + 2)
    shown = maps.image.convert("RGB")
    shown.thumbnail((FIGURE_IMAGE_PX, FIGURE_IMAGE_PX))
    _draw_overview(figure.add_subplot(grid[:, :2]), maps, shown)
    for i, attention in enumerate(maps.decoder):
        axes = figure.add_subplot(grid[0, 2 + i])
        _draw_map(axes, maps, shown, attention)
        _draw_box(axes, maps.prediction, i)
        axes.set_title(_caption(maps.prediction, i), fontsize=11)
    for i, attention in enumerate(maps.encoder):
        axes = figure.add_subplot(grid[1, 2 + i])
        _draw_map(axes, maps, shown, attention)
        _draw_point(axes, maps.points_px[i], str(i + 1))
        axes.set_title(f"encoder, point {i + 1}", fontsize=11)
    if path is not None:
        figure.savefig(path, format="png")
    return figure


def _draw_overview(axes: Axes, maps: AttentionMaps, shown: Image.Image) -> None:
    found = maps.prediction
    scale = shown.width / maps.image.width
    boxes, labels, scores = found.boxes_xyxy_px * scale, found.labels.tolist(), found.scores.tolist()
    # A small picture is enlarged, or its labels would cover it.
    _show(axes, maps, draw_boxes(shown, boxes, labels, found.names, scores, min_size=FIGURE_IMAGE_PX // 2))
    for i, point in enumerate(maps.points_px):
        _draw_point(axes, point, str(i + 1))
    axes.set_title("detections and points" if len(found) else "no detection above the threshold", fontsize=11)


def _show(axes: Axes, maps: AttentionMaps, picture: Any, **how: Any) -> None:
    # The axes count in pixels of the original image, whatever the size of the array shown.
    axes.imshow(picture, extent=(0, maps.image.width, maps.image.height, 0), **how)
    axes.set_axis_off()


def _draw_map(axes: Axes, maps: AttentionMaps, shown: Image.Image, attention: Tensor) -> None:
    """Lay the attention over the image in grey; the stronger it is, the less of the image shows through."""
    _show(axes, maps, shown.convert("L"), cmap="gray", vmin=0, vmax=255)
    heat = attention.float() / attention.max().clamp(min=torch.finfo(torch.float32).tiny)
    how = {"cmap": "inferno", "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
    _show(axes, maps, heat.numpy(), alpha=(0.4 + 0.5 * heat).numpy(), **how)
    axes.set_xlim(0, maps.image.width)
    axes.set_ylim(maps.image.height, 0)


def _draw_box(axes: Axes, prediction: Prediction, i: int) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = prediction.boxes_xyxy_px[i].tolist()
    color = tuple(part / 255 for part in class_color(int(prediction.labels[i])))
    box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=2)
    axes.add_patch(box)


def _draw_point(axes: Axes, point_px: tuple[float, float], text: str) -> None:
    axes.plot(*point_px, marker="o", markersize=14, markerfacecolor="white", markeredgecolor="black", clip_on=False)
    axes.annotate(text, point_px, ha="center", va="center_baseline", fontsize=9, annotation_clip=False)


def _caption(prediction: Prediction, i: int) -> str:
    return f"decoder, {prediction.names[i]} {float(prediction.scores[i]):.2f}"
