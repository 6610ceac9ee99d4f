"""How time grows with each size of a problem: one contest for each point of a curve, against the original's way.

A contest is called "<what> over <axis>: <value>"; ``detr-fast bench-report`` draws the points of a curve and fits the
exponent of growth. All sizes but the one of the axis stand still. Of ``assignment`` the number of problems is batch
times layers: it solves them one by one, whatever they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pytest

from benchmarks import bench_assignment, bench_attention, bench_loss, bench_matching, bench_train_step, costs
from benchmarks.harness import Contest
from benchmarks.shapes import COCO_TARGETS, MapShape, Shape, TrainShape

Race = Callable[[str, str, Callable[[], Contest]], None]
Build = Callable[[int], Contest]

MATCHERS, SOLVERS = ("original", "padded", "match_layers"), ("scipy", "native")
ATTENTIONS, CRITERIA = ("original", "sdpa-flash", "native", "triton"), ("original", "total")
# Of one image, but for what an axis changes: COCO's mean number of objects, rounded.
TARGETS = 7


def matching(queries: int = 100, targets: int = TARGETS, batch: int = 4, layers: int = 6) -> Contest:
    shape = Shape("", (targets,) * batch, num_queries=queries, num_layers=layers)
    return only(MATCHERS, bench_matching.contest(shape))


def assignment(queries: int = 100, targets: int = TARGETS, problems: int = 24) -> Contest:
    problem_set = bench_assignment.Problems("", costs.trained, queries, (targets,) * problems)
    return only(SOLVERS, bench_assignment.contest(problem_set))


def attention(tokens: int) -> Contest:
    """Self-attention of one image whose feature map is square."""
    side = 32 * round(tokens**0.5)
    return bench_attention.contest(bench_attention.batch(MapShape("", ((side, side),)), False), 0.0, ATTENTIONS)


def criterion(batch: int) -> Contest:
    return only(CRITERIA, bench_loss.contest(Shape("", (TARGETS,) * batch)))


def train_step(size: int) -> Contest:
    """Two square images."""
    shape = TrainShape("", (size, size), COCO_TARGETS[2:4])
    return replace(bench_train_step.contest(shape), parts=None)


def only(names: Sequence[str], contest: Contest) -> Contest:
    """A contest without the other contestants."""
    skipped = {name: reason for name, reason in contest.skipped.items() if name in names}
    return replace(contest, contestants=[c for c in contest.contestants if c.name in names], skipped=skipped)


# By curve: the contestants, a contest by value, and the values.
CURVES: Mapping[str, tuple[tuple[str, ...], Build, tuple[int, ...]]] = {
    "matching over queries": (MATCHERS, lambda n: matching(queries=n), (50, 100, 200, 400, 800)),
    "matching over targets": (MATCHERS, lambda n: matching(queries=300, targets=n, batch=2), (4, 16, 64, 256)),
    "matching over batch": (MATCHERS, lambda n: matching(batch=n), (1, 2, 4, 8, 16, 32)),
    "matching over layers": (MATCHERS, lambda n: matching(layers=n), (1, 2, 4, 8, 16)),
    "assignment over queries": (SOLVERS, lambda n: assignment(queries=n), (50, 100, 200, 400, 800)),
    "assignment over targets": (SOLVERS, lambda n: assignment(queries=300, targets=n), (4, 16, 64, 256)),
    "assignment over problems": (SOLVERS, lambda n: assignment(problems=n), (6, 24, 96, 384)),
    "attention over tokens": (ATTENTIONS, attention, (144, 324, 784, 1600, 2304)),
    "criterion over batch": (CRITERIA, criterion, (1, 2, 4, 8, 16, 32)),
    "train step over image size": (bench_train_step.CONTESTANTS, train_step, (128, 192, 256, 384)),
}
POINTS = [
    pytest.param(curve, value, contestant, id=f"{curve} {value}-{contestant}".replace(" ", "-"))
    for curve, (contestants, _, values) in CURVES.items()
    for value in values
    for contestant in contestants
]


@pytest.mark.large
@pytest.mark.parametrize(("curve", "value", "contestant"), POINTS)
def test_scaling(race: Race, curve: str, value: int, contestant: str) -> None:
    _, build, _ = CURVES[curve]
    race(f"{curve}: {value}", contestant, partial(build, value))
