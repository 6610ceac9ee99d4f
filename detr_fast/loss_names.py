"""What the losses of ``SetCriterion`` are called, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

# The results of ``set_loss``, and those of them that belong to each of ``losses``.
ROWS = ("loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error")
NAMES = {
    "labels": ("loss_ce", "class_error"),
    "boxes": ("loss_bbox", "loss_giou"),
    "cardinality": ("cardinality_error",),
}


class Losses(dict[str, Tensor]):
    """Losses by name.

    Attributes:
        at_once: where all losses of all layers were computed at once, those that have gradients as one tensor, and by
            their names, in its order, the single numbers that are among the values.
    """

    at_once: tuple[Tensor, dict[str, Tensor]] | None = None


def with_numbers(layers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The losses of layers, of which the first is the final one, as one dict."""
    losses = dict(layers[0])
    for number, layer_losses in enumerate(layers[1:]):
        losses.update({f"{name}_{number}": value for name, value in layer_losses.items()})
    return losses


def known_of_layer(names: Sequence[str], rows: Sequence[Tensor], number: int) -> dict[str, dict[str, Tensor]]:
    """What each of ``names`` gives for a layer, by the layer's ROWS."""
    values = dict(zip(ROWS, rows, strict=False))
    known = {name: {row: values[row] for row in NAMES[name]} for name in names}
    if number > 0 and "labels" in known:
        del known["labels"]["class_error"]
    return known


def named(names: tuple[str, ...], values: Tensor, numbers: tuple[Tensor, ...]) -> Losses:
    """``numbers``, which are ROWS of every layer, as one dict, and ``values`` as those of them that are added up."""
    keys, places, of_values = _keys_and_places(names, len(numbers) // len(ROWS))
    losses = Losses(zip(keys, [numbers[place] for place in places], strict=True))
    losses.at_once = values, dict(zip(of_values, numbers, strict=False))
    return losses


@lru_cache(maxsize=16)
def _keys_and_places(names: tuple[str, ...], layers: int) -> tuple[list[str], list[int], list[str]]:
    """The names of all losses in order, their places among the numbers, and the names of the first numbers.

    It depends on nothing else, and to make it takes as long as to look at 20 tensors.
    """
    suffixes = ["", *(f"_{number}" for number in range(layers - 1))]
    places = {row + suffix: i * layers + j for i, row in enumerate(ROWS) for j, suffix in enumerate(suffixes)}
    keys = [
        row + suffix
        for suffix in suffixes
        for name in names
        for row in NAMES[name]
        if row != "class_error" or not suffix
    ]
    return keys, [places[key] for key in keys], list(places)[: 3 * layers]
