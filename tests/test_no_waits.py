"""A training step never waits for the device: no value goes to the host in forward, matching, loss, backward, update.

Three times: on the CPU, where methods and operators that would wait raise; forward on a GPU that is only pretended,
where no tensor has a value that could be asked for; and on a GPU, where torch itself raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from small import random_outputs, random_targets, small_criterion, small_detr
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from waits import Wait, no_waits

from detr_fast.data.batch import ImageBatch
from detr_fast.ops import (
    CostWeights,
    CrossEntropy,
    Focal,
    PackedTargets,
    Varifocal,
    matching,
    matching_cost,
    set_criterion,
    set_loss,
)
from detr_fast.ops.set_loss.api import OP

# What looks at targets where they lie on the host, and at nothing on a device: _check_labels is called for tensors on
# the CPU only, _values_are_good likewise.
LOOKS_AT_THE_HOST = ("_check_labels", "_values_are_good")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: 1 if (x > 0).any() else 0,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.nonzero(x),
        lambda x: torch.where(x > 0),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.clone().index_put_((x > 0,), torch.tensor(1.0)),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: range(3)[x.long().sum()],
    ],
)
def test_the_guard_finds_a_wait(wait: Callable[[Tensor], object]) -> None:
    x = torch.rand(3)
    wait(x)
    with pytest.raises(Wait), no_waits():
        wait(x)


def test_the_guard_finds_a_wait_in_backward() -> None:
    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient if gradient.item() > 0 else -gradient

    x = torch.rand((), requires_grad=True)
    with pytest.raises(Wait), no_waits():
        Looks.apply(x).backward()


def training_step(
    model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, images: object, targets: list
) -> Tensor:
    losses = criterion(model(images), targets)
    weights = criterion.weight_dict
    total = torch.stack([losses[name] * weights[name] for name in losses if name in weights]).sum()
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return total


def two_steps(device: str, guard: Callable[[], AbstractContextManager[None]], *, padded: bool) -> None:
    model = small_detr(dropout=0.1).to(device).train()
    criterion = small_criterion().to(device)
    # The fused optimizer keeps its count of steps on the device.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    sizes = [(64, 96), (48, 80)] if padded else [(64, 96)] * 2
    images = ImageBatch.of([torch.randn(3, *size) for size in sizes]).to(device)
    for counts in ([3, 0], [9, 2]):
        targets = [{k: v.to(device) for k, v in target.items()} for target in random_targets(counts)]
        with guard():
            training_step(model, criterion, optimizer, images, targets)


@pytest.mark.parametrize("padded", [False, True])
def test_two_steps_on_the_cpu_look_at_no_value(padded: bool) -> None:
    two_steps("cpu", lambda: no_waits(*LOOKS_AT_THE_HOST), padded=padded)


@pytest.mark.parametrize("class_loss", [CrossEntropy(), Focal(), Varifocal()])
def test_ops_on_the_cpu_look_at_no_value(class_loss: CrossEntropy | Focal | Varifocal) -> None:
    outputs, packed = random_outputs(2), PackedTargets.pack(random_targets([3, 9]))
    logits, boxes = [outputs["pred_logits"].requires_grad_()], [outputs["pred_boxes"].requires_grad_()]
    with no_waits(*LOOKS_AT_THE_HOST):
        matching_cost(logits, boxes, packed)
        queries = matching(logits, boxes, packed).query_of_target
        losses = set_loss(logits, boxes, packed, queries, class_loss, num_boxes=12)
        torch.stack(losses[:3]).sum().backward()
        set_loss(logits, boxes, packed, queries, class_loss, num_boxes=12, backend="reference")
        torch.stack(
            set_criterion(logits, boxes, packed, CostWeights(), class_loss, num_boxes=12).losses[:3]
        ).sum().backward()


def test_the_criterion_on_a_pretended_gpu_needs_no_value() -> None:
    with FakeTensorMode(), no_waits():
        if OP.choose(None, torch.empty(0, device="cuda")).name == "reference":
            pytest.skip("the reference copies counts to the device; another implementation cannot run here")
        criterion = small_criterion()
        criterion.empty_weight = torch.ones(6, device="cuda")
        outputs = [{k: torch.rand(v.shape, device="cuda") for k, v in random_outputs(2).items()} for _ in range(3)]
        targets = [
            {
                "labels": torch.zeros(count, dtype=torch.int64, device="cuda"),
                "boxes": torch.zeros(count, 4, device="cuda"),
            }
            for count in (3, 9)
        ]
        losses = criterion(outputs[0] | {"aux_outputs": outputs[1:]}, targets)
        # No backward: it would ask the driver for the device.
        assert all(value.device.type == "cuda" and value.ndim == 0 for value in losses.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("padded", [False, True])
def test_two_steps_on_a_gpu_do_not_wait(padded: bool) -> None:
    two_steps("cuda", nullcontext, padded=padded)  # compiles kernels, chooses algorithms
    two_steps("cuda", cuda_raises_at_a_wait, padded=padded)


@contextmanager
def cuda_raises_at_a_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
