"""Training with kernels and training with references: the same run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.original_transformer import OriginalTransformer
from detr_fast import Transformer
from detr_fast.build import criterion_from_args, model_from_args
from detr_fast.data.batch import collate
from detr_fast.data.digits import DigitScenes
from detr_fast.demo import LOSS, MODEL, SIZE
from detr_fast.ops import _dispatch

STEPS, BATCH = 7, 4


def losses(pre_norm: bool, steps: int = STEPS) -> list[float]:
    """The demo's model trained for some steps on the demo's scenes, from the same weights."""
    options = vars(replace(MODEL, pre_norm=pre_norm)) | vars(LOSS)
    args = SimpleNamespace(**options, num_classes=DigitScenes.num_classes)
    torch.manual_seed(0)
    model, criterion = model_from_args(args).train(), criterion_from_args(args)
    # Not Adam, whose first steps have the size of the learning rate whatever the gradient's: where that is zero but for
    # rounding, two runs go apart.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scenes = DigitScenes("train", STEPS * BATCH, size=SIZE)
    found = []
    for step in range(steps):
        samples, targets = collate([scenes[i] for i in range(step * BATCH, (step + 1) * BATCH)])
        parts = criterion(model(samples), targets)
        loss = sum(parts[name] * weight for name, weight in criterion.weight_dict.items() if name in parts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("pre_norm", [True, False])
def test_kernels_and_references_train_alike(pre_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = losses(pre_norm)
    asked: set[str] = set()

    def reference(op: _dispatch.Op, backend: str | None, *tensors: Tensor) -> _dispatch.Implementation:
        asked.add(op.name)
        return op.implementations[-1]

    monkeypatch.setattr(_dispatch.Op, "choose", reference)
    with_references = losses(pre_norm)
    assert {"attention", "matching", "set_loss"} <= asked
    assert with_kernels[-1] < with_kernels[0] * 0.9, "nothing was learned"
    assert with_kernels == pytest.approx(with_references, rel=1e-5)


def test_dropout_is_the_originals_in_distribution() -> None:
    """Mean and variance of every embedding over many draws, against PyTorch's own dropout at its places."""
    ours = Transformer(16, 2, 1, 2, 32, 0.2, return_intermediate_dec=True)
    theirs = OriginalTransformer(16, 2, 1, 2, 32, 0.2)
    theirs.load_state_dict(ours.state_dict())
    draws, query_embed = 1500, torch.randn(5, 16)
    src, pos = (torch.randn(1, 16, 2, 3).expand(draws, -1, -1, -1) for _ in range(2))
    mask = torch.zeros(draws, 2, 3, dtype=torch.bool)
    mask[:, :, 2] = True
    with torch.no_grad():
        found, memory = ours.train()(src, mask, query_embed, pos)
        expected, their_memory = theirs.train()(src, mask, query_embed, pos)
    valid = (slice(None), slice(None), slice(None), slice(2))
    compare_moments(found.transpose(0, 1).flatten(1), expected.transpose(0, 1).flatten(1))
    compare_moments(memory[valid].flatten(1), their_memory[valid].flatten(1))


def compare_moments(a: Tensor, b: Tensor) -> None:
    """[draws, N] each: means within five standard errors, variances within a fifth in the mean over N."""
    assert a.var(0).min() > 1e-4, "dropout acts everywhere"
    z = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / len(a)).sqrt()
    # Of a thousand means the largest deviates by 3.3; more than 6 has a chance of 2e-9 for each.
    assert z.abs().max() < 6
    assert 0.9 < (a.var(0) / b.var(0)).mean() < 1.1


def test_dropout_goes_on_drawing() -> None:
    model = Transformer(16, 2, 1, 1, 32, 0.5).train()
    arguments = torch.randn(2, 16, 2, 3), None, torch.randn(5, 16), torch.randn(2, 16, 2, 3)
    torch.manual_seed(1)
    first, second = model(*arguments)[0], model(*arguments)[0]
    torch.manual_seed(1)
    assert torch.equal(model(*arguments)[0], first) and not torch.equal(first, second)
    same = torch.randn(1, 16, 2, 3).expand(2, -1, -1, -1)
    hs = model(same, None, arguments[2], same)[0]
    assert not torch.equal(hs[:, 0], hs[:, 1]), "each image has its own dropout"
