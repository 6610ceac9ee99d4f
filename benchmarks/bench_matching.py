"""Matching queries to targets for all decoder layers of a batch, against the original way.

``padded`` is the best way with packages that exist. ``detr_fast`` is HungarianMatcher as it takes the original's place,
one layer at a time; ``match_layers`` is its way in for all layers at once; ``reference`` and ``native`` are the op
alone, by backend. The floors are what no way can do without: reading all logits once, and their exponentials, as
torch does them with all threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks import original, padded, where
from benchmarks.harness import Contest, Contestant
from benchmarks.marks import marked
from benchmarks.shapes import MATCHING_SHAPES, Shape
from detr_fast import HungarianMatcher
from detr_fast.matcher import matched_pairs
from detr_fast.ops import CostWeights, PackedTargets, matching
from detr_fast.ops.matching.api import OP

Race = Callable[[str, str, Callable[[], Contest]], None]
WEIGHTS = CostWeights(cost_class=1, cost_bbox=5, cost_giou=2)
BACKENDS = ("reference", "native")
CONTESTANTS = ("original", "padded", "transformers", "detr_fast", "match_layers", *BACKENDS)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("shape", marked(MATCHING_SHAPES, lambda shape: shape.num_queries > 100))
def test_matching(race: Race, shape: Shape, contestant: str) -> None:
    race(f"matching {shape.name}", contestant, lambda: contest(shape))


def contest(shape: Shape) -> Contest:
    """All contestants on the same predictions, all layers of them."""
    layers, targets = inputs(shape)
    matcher = HungarianMatcher(*WEIGHTS[:3])
    logits, boxes = [x["pred_logits"] for x in layers], [x["pred_boxes"] for x in layers]

    def op(backend: str) -> Contestant:
        return Contestant(
            backend,
            lambda: matching(logits, boxes, PackedTargets.pack(targets), WEIGHTS, backend=backend).query_of_target,
        )

    expected = total_costs(original.match_layers(layers, targets), layers, targets)
    theirs, skipped = transformers_matcher(layers, targets)
    reasons = OP.reasons(where.device())
    skipped |= {name: reason for name, reason in reasons.items() if reason is not None}
    return Contest(
        [
            Contestant("original", lambda: original.match_layers(layers, targets)),
            Contestant("padded", lambda: padded.match_layers(layers, targets)),
            *theirs,
            Contestant("detr_fast", lambda: [matcher(outputs, targets) for outputs in layers]),
            Contestant("match_layers", lambda: matcher.match_layers(layers, targets)),
            *(op(backend) for backend, reason in reasons.items() if reason is None),
        ],
        lambda found: check_matches(as_pairs(found, targets), layers, targets, expected),
        str(where.device()),
        floors=floors(logits),
        skipped=skipped,
    )


def transformers_matcher(
    layers: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]
) -> tuple[list[Contestant], dict[str, str]]:
    """The matcher of transformers' DETR, layer by layer as its loss calls it; or why there is none."""
    try:
        from transformers.loss.loss_for_object_detection import HungarianMatcher as TheirMatcher
    except ImportError as error:
        return [], {"transformers": f"transformers has no matcher here: {error}"}
    matcher = TheirMatcher(*WEIGHTS[:3])
    outputs = [{"logits": layer["pred_logits"], "pred_boxes": layer["pred_boxes"]} for layer in layers]
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    try:
        matcher(outputs[0], labels)
    except Exception as error:  # it lacks functions where Pillow is not installed, and is imported nevertheless
        return [], {"transformers": f"its matcher does not run here: {type(error).__name__}: {error}"}
    return [Contestant("transformers", lambda: [matcher(layer, labels) for layer in outputs])], {}


def floors(logits: Sequence[Tensor]) -> list[Contestant]:
    """What takes a part of every contestant's time: all logits read once, and their exponentials."""
    exponentials = torch.empty_like(logits[0])  # written again and again, so that it stays in the cache
    return [
        Contestant("floor: logits read", lambda: [layer.sum() for layer in logits]),
        Contestant("floor: exponentials", lambda: [torch.exp(layer, out=exponentials) for layer in logits]),
    ]


def as_pairs(found: Tensor | list[original.Matches], targets: Sequence[dict[str, Tensor]]) -> list[original.Matches]:
    """Results as the original gives them; those of the op are [L, N], the query of each target of the batch."""
    if not isinstance(found, Tensor):
        return found
    counts = [len(target["labels"]) for target in targets]
    return [[matched_pairs(image) for image in layer.split(counts)] for layer in found.cpu()]


def inputs(shape: Shape) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Predictions of every layer and targets, with boxes of the sizes that COCO's have: mostly small."""
    generator = torch.Generator().manual_seed(0)

    def boxes(*lead: int) -> Tensor:
        size = 0.02 + 0.5 * torch.rand(*lead, 2, generator=generator) ** 2
        centre = size / 2 + (1 - size) * torch.rand(*lead, 2, generator=generator)
        return torch.cat([centre, size], -1).to(where.device())

    def logits() -> Tensor:
        size = (shape.batch, shape.num_queries, shape.num_classes + 1)
        return torch.randn(size, generator=generator).to(where.device())

    def labels(count: int) -> Tensor:
        return torch.randint(shape.num_classes, (count,), generator=generator).to(where.device())

    layers = [
        {"pred_logits": logits(), "pred_boxes": boxes(shape.batch, shape.num_queries)} for _ in range(shape.num_layers)
    ]
    targets = [{"labels": labels(count), "boxes": boxes(count)} for count in shape.targets]
    return layers, targets


def check_matches(
    matches: list[original.Matches],
    layers: list[dict[str, Tensor]],
    targets: list[dict[str, Tensor]],
    expected: Tensor,
) -> None:
    """Raise unless every image's matches are one to one, complete, and cost as little as ``expected`` says.

    The cost is compared, not the indices: two matchings whose costs differ by rounding are both right.
    """
    num_queries = layers[0]["pred_logits"].shape[1]
    assert len(matches) == len(layers), f"matches of {len(matches)} layers, expected {len(layers)}"
    for layer, images in enumerate(matches):
        for image, ((queries, chosen), target) in enumerate(zip(images, targets, strict=True)):
            complete = min(num_queries, len(target["boxes"]))
            counts = (len(set(queries.tolist())), len(set(chosen.tolist())), len(queries), len(chosen))
            assert counts == (complete,) * 4, f"layer {layer}, image {image}: {counts=}, expected {complete} each"
    torch.testing.assert_close(
        total_costs(matches, layers, targets), expected, rtol=1e-6, atol=1e-6, msg=lambda text: f"total cost: {text}"
    )


def total_costs(
    matches: list[original.Matches], layers: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]
) -> Tensor:
    """[L, B] float64: the cost of the matched pairs of each layer and image."""
    return torch.stack(
        [
            torch.stack(
                [
                    cost_of_image(outputs, target, image)[queries, chosen].sum()
                    for image, ((queries, chosen), target) in enumerate(zip(images, targets, strict=True))
                ]
            )
            for images, outputs in zip(matches, layers, strict=True)
        ]
    )


def cost_of_image(
    outputs: dict[str, Tensor],
    target: dict[str, Tensor],
    image: int,
    class_cost: Callable[[Tensor], Tensor] = original.softmax_cost,
) -> Tensor:
    """[Q, T] float64: the matching cost of every query and target of one image."""
    of_classes = class_cost(outputs["pred_logits"][image].double())
    boxes, target_boxes = outputs["pred_boxes"][image].double(), target["boxes"].double()
    giou = original.giou_of_all_pairs(original.corners(boxes), original.corners(target_boxes))
    return 5 * torch.cdist(boxes, target_boxes, p=1) + of_classes[:, target["labels"]] - 2 * giou
