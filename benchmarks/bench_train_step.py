"""A whole training step with ResNet-50, and the share of each of its parts, against the original way.

A step is forward pass, matching and losses, backward pass, clipping, and AdamW with two learning rates (0 here, so that
every step does the same). Other processes load its batch in the meantime, which is a part in brackets; so is the
matcher alone, called once more, because ours computes the matching together with the losses. The floor is the step's
operations as products of matrices; Winograd's algorithm does with fewer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import matrix_products, original_criterion, where
from benchmarks.anatomy import Clock, timings_of_parts
from benchmarks.harness import Contest, Contestant, Timing, compare
from benchmarks.original import match_layers
from benchmarks.original_model import OriginalDetr, calibrate, optimizer_of
from benchmarks.shapes import TRAIN_STEP, PhotographShape, TrainShape
from detr_fast import SetCriterion, detr_resnet50, graphed_step
from detr_fast.build import criterion_from_args
from detr_fast.config import OptimConfig
from detr_fast.data.batch import ImageBatch, collate
from detr_fast.data.target_batch import TargetBatch
from detr_fast.finite import FiniteGuard
from detr_fast.fit import LossMeter, clip_gradients
from detr_fast.ops import PaddedTargets
from detr_fast.train_state import build_optimizer

Race = Callable[[str, str, Callable[[], Contest]], None]
Samples = list[tuple[Tensor, dict[str, Tensor]]]
CONTESTANTS = ("original", "detr_fast")
GRAPHED = ("original", "detr_fast", "cuda_graph")
OPTIMIZERS = {"original": {"foreach": False}, "foreach": {"foreach": True}, "detr_fast": {"fused": True}}
# Steps that are compared are of this size: as many layers, and seconds less.
CHECKED = TrainShape("checked", (96, 128), (3, 1))


@pytest.mark.large
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_train_step(race: Race, contestant: str) -> None:
    race(f"train step {TRAIN_STEP.name}", contestant, lambda: contest(TRAIN_STEP))


@pytest.mark.large
@pytest.mark.skipif(where.device().type != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("contestant", GRAPHED)
def test_cuda_graph(race: Race, contestant: str) -> None:
    race(f"train step with CUDA graphs {TRAIN_STEP.name}", contestant, lambda: contest(TRAIN_STEP, graphed=True))


@pytest.mark.parametrize("contestant", OPTIMIZERS)
def test_optimizer(race: Race, contestant: str) -> None:
    race("AdamW of DETR-R50", contestant, optimizers)


class Step:
    """A contestant: ``run`` is a training step."""

    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        self.model = model.to(where.device()).train()
        self.images, self.targets = on_device(samples)
        self.criterion: SetCriterion = criterion_from_args(SimpleNamespace(num_classes=91)).to(where.device())
        self.clock = Clock(str(where.device()))
        # Every DETR projects what its backbone gives: here the backbone ends, and its gradient begins.
        self.model.get_submodule("input_proj").register_forward_pre_hook(self._at_the_backbones_end)

    def predict(self, images: ImageBatch) -> Any:
        """The layers' predictions, in whatever form."""
        raise NotImplementedError

    def match(self, outputs: Any) -> None:
        """All layers."""
        raise NotImplementedError

    def loss(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
        """The weighted sum."""
        raise NotImplementedError

    def update(self, total: Tensor) -> None:
        """Everything after the backward pass."""
        raise NotImplementedError

    def run(self) -> Step:
        """A step."""
        self.clock.start()
        outputs = self.predict(self.images)
        self.clock.mark("transformer")
        if self.clock.running:
            self.match(outputs)
            self.clock.mark("(matcher alone)")
        total = self.loss(outputs, self.targets)
        self.clock.mark("matcher and criterion")
        self.optimizer.zero_grad()
        total.backward()
        self.clock.mark("backward, backbone")
        self.update(total)
        self.clock.mark("optimizer")
        return self

    def _at_the_backbones_end(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.clock.mark("backbone")
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: self.clock.mark("backward, transformer and criterion"))

    def total_and_norm(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """The loss without dropout, and the norm of its gradient."""
        images, targets = on_device(samples)
        self.model.eval().zero_grad()
        total = self.loss(self.predict(images), targets)
        total.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.model.train().zero_grad()
        return total.detach(), norm


class OriginalStep(Step):
    """The original's loop."""

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        super().__init__(model, samples)
        self.optimizer = optimizer_of(model, lr=0.0, lr_backbone=0.0)
        self.losses: dict[str, Tensor] = {}

    def predict(self, images: ImageBatch) -> Any:
        return self.model(images.images, images.mask)

    @torch.no_grad()
    def match(self, outputs: Any) -> None:
        match_layers(outputs, self.targets)

    def loss(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
        self.losses = original_criterion.losses_of_layers(outputs, targets, self.criterion.empty_weight)
        return self._weighted(self.losses)

    def update(self, total: Tensor) -> None:
        logged = self._weighted({name: loss.detach() for name, loss in self.losses.items()}).item()
        assert logged == logged
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        for loss in self.losses.values():
            loss.item()  # to the log

    def _weighted(self, losses: dict[str, Tensor]) -> Tensor:
        weights = self.criterion.weight_dict
        return sum(losses[name] * weights[name] for name in losses if name in weights)  # type: ignore[return-value]


class OurStep(Step):
    """The inner part of ``detr_fast.fit``."""

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        super().__init__(model, samples)
        self.optimizer = build_optimizer(model, OptimConfig(lr=0.0, lr_backbone=0.0))
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.guard = FiniteGuard(self.optimizer, where.device())
        self.meter = LossMeter(self.criterion.weight_dict)
        self.losses: dict[str, Tensor] = {}

    def predict(self, images: ImageBatch) -> Any:
        return self.model(images)

    def match(self, outputs: Any) -> None:
        self.criterion.matcher.match_layers([outputs, *outputs["aux_outputs"]], self.targets)  # type: ignore[operator]

    def loss(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
        self.losses = self.criterion(outputs, targets)
        return self.criterion.total(self.losses)

    def update(self, total: Tensor) -> None:
        self.meter.add(self.losses, total)
        self.guard.saw(self.targets, self.losses, total)
        self.guard.check(clip_gradients(self.parameters, 0.1, self.optimizer), 0, 0)
        self.optimizer.step()


class GraphedStep(OurStep):
    """``detr_fast train --cuda-graph``."""

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        super().__init__(model, samples)
        self.graphs = graphed_step.GraphedStep(self._on_device, self.optimizer, held=self.criterion.held)

    def run(self) -> Step:
        with self.graphs.turn():
            update = self.graphs(self.images, self.targets)
            if update is None:  # of each size the first batch
                return super().run()
            self.meter.add(update.losses, update.total)
            self.guard.saw(self.targets, update.losses, update.total)
            self.guard.expect(update.finite, 0, 0)
        return self

    def _on_device(self, images: ImageBatch, targets: PaddedTargets) -> graphed_step.Update:
        self.optimizer.zero_grad()
        losses = self.criterion.of_padded(self.model(images), targets)
        total = self.criterion.total(losses)
        total.backward()
        finite = self.guard.hold_back(clip_gradients(self.parameters, 0.1, self.optimizer), [total.detach()])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return graphed_step.Update({name: loss.detach() for name, loss in losses.items()}, total.detach(), finite)

    def _at_the_backbones_end(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        """A graph has no parts to look at."""


def contest(shape: TrainShape, *, graphed: bool = False) -> Contest:
    """All ways with the same weights; they agree on a small batch without dropout."""
    torch.manual_seed(0)
    ours, original = detr_resnet50(aux_loss=True), OriginalDetr()
    original.load_state_dict(ours.state_dict())
    samples, checked = random_samples(shape), random_samples(CHECKED)
    calibrate(original, collate(checked)[0].images)
    ours.load_state_dict(original.state_dict())
    steps: dict[str, Step] = {"cuda_graph": GraphedStep(copy.deepcopy(ours), samples)} if graphed else {}
    steps = {"original": OriginalStep(original, samples), "detr_fast": OurStep(ours, samples)} | steps
    total, norm = steps["original"].total_and_norm(checked)

    def check(step: Step) -> None:
        torch.testing.assert_close(step.total_and_norm(checked), (total, norm), rtol=1e-3, atol=0)

    def parts() -> dict[str, list[Timing]]:
        from benchmarks import bench_data  # on demand: the step itself is measured without Pillow too

        found = timings_of_parts({name: (step.clock, step.run) for name, step in steps.items()})
        loading = compare(bench_data.contest(photographs(shape)), seconds_each=0.2, min_rounds=3)
        return found | {"(data, in another process)": loading}

    return Contest(
        [Contestant(name, step.run) for name, step in steps.items()],
        check,
        str(where.device()),
        floors=[matrix_products.floor(matrix_products.flops_of(steps["original"].run), where.device())],
        parts=None if graphed else parts,
    )


def photographs(shape: TrainShape) -> PhotographShape:
    """Files to load such a batch from: COCO's pictures are scaled up by a third."""
    height, width = shape.image_size
    size = (3 * width // 4, 3 * height // 4)
    return PhotographShape(shape.name, size, len(shape.targets), min(shape.image_size), max(shape.image_size))


def on_device(samples: Samples) -> tuple[ImageBatch, TargetBatch]:
    """As one batch, where it is trained on."""
    images, targets = collate(samples)
    return images.to(where.device()), targets.to(where.device())


def random_samples(shape: TrainShape) -> Samples:
    """Noise, and boxes around its middle."""
    samples = []
    for count in shape.targets:
        boxes = torch.cat((0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.4 * torch.rand(count, 2)), 1)
        target = {"labels": torch.randint(shape.num_classes, (count,)), "boxes": boxes}
        samples.append((torch.randn(3, *shape.image_size), target))
    return samples


def optimizers() -> Contest:
    """AdamW alone, as PyTorch makes it by default on a CPU, and in its other forms."""
    torch.manual_seed(0)
    model = detr_resnet50()
    sizes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]

    def contestant(options: dict[str, bool]) -> Callable[[], Tensor]:
        parameters = [nn.Parameter(torch.ones(size, device=where.device())) for size in sizes]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.01)
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=1e-4, **options)  # type: ignore[arg-type]

        def run() -> Tensor:
            optimizer.step()
            return optimizer.state[parameters[0]]["exp_avg"]

        return run

    def check(average: Tensor) -> None:
        torch.testing.assert_close(average, torch.full_like(average, 0.001))

    return Contest(
        [Contestant(name, contestant(options)) for name, options in OPTIMIZERS.items()], check, str(where.device())
    )
