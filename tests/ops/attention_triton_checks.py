"""What is asked of the Triton attention wherever it can run: on a GPU, or without one under Triton's interpreter.

The interpreter has to be chosen before the kernels are imported, so ``test_attention_triton.py`` runs this file in a
process of its own. Not collected by name.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from detr_fast.ops import Dropout, TokenOffsets, attention
from detr_fast.ops.attention import triton_impl
from detr_fast.ops.attention.triton_choices import Choice, candidates, kinds
from detr_fast.ops.attention.triton_tiles import IMAGES_PER_STEP
from detr_fast.ops.attention.types import AttentionInputs
from ops.attention_cases import (
    SHAPES,
    Shape,
    as_parts,
    assert_as_exact_as,
    gradients,
    in_double,
    make_inputs,
    oracle,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Few programs and many keys: a multiprocessor is left without work unless keys are split.
SPLIT = Shape(1, 32, [20, 3], [270, 13])
ORDINARY = Shape(1, 32, [37, 5], [70, 33])
# The interpreter takes a tenth of a second for a program.
SIZES = {name: shape._replace(heads=min(shape.heads, 1)) for name, shape in SHAPES.items()} | {
    "two heads": Shape(2, 16, [3, 4], [5, 2]),
    "split": SPLIT,
    "more images than a step": Shape(1, 16, [i // 33 * 3 + (i == 5) for i in range(34)], [i // 32 for i in range(34)]),
}
assert IMAGES_PER_STEP.value < 34


def on_device(inputs: AttentionInputs) -> AttentionInputs:
    q, k, v, query_offsets, key_offsets, scale, dropout = inputs
    if DEVICE.type == "cpu":
        return inputs
    offsets = [TokenOffsets.of(o.lengths, DEVICE) for o in (query_offsets, key_offsets)]
    moved = None if dropout is None else Dropout(dropout.p, dropout.seed.to(DEVICE))
    return AttentionInputs(*(as_parts(x.to(DEVICE)) for x in (q, k, v)), *offsets, scale, moved)


def call(inputs: AttentionInputs) -> Tensor:
    """On the device, and back."""
    *tensors, scale, dropout = on_device(inputs)
    return attention(*tensors, scale=scale, dropout=dropout, backend="triton").cpu()


def check(inputs: AttentionInputs) -> None:
    grad = torch.randn(inputs.query.shape).to(inputs.query.dtype)
    exact = gradients(oracle, in_double(inputs), grad.double())
    theirs = gradients(oracle, inputs, grad)
    assert exact[0].numel() < 100 or sum(inputs.key_offsets.lengths) == 0 or exact[0].std() > 0.1, "nothing to see"
    assert_as_exact_as(gradients(call, inputs, grad), theirs, exact)


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_is_as_exact_as_sdpa(shape: Shape) -> None:
    check(make_inputs(shape, p=random.choice([None, 0.25])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [None, 0.25])
def test_dtypes(p: float | None, dtype: torch.dtype) -> None:
    check(make_inputs(random.choice([ORDINARY, SPLIT, SIZES["an odd head size"], SIZES["large heads"]]), dtype, p))


def test_split_is_split() -> None:
    launches = triton_impl.Launches(make_inputs(SPLIT))
    if DEVICE.type == "cpu":
        assert launches.grid(triton_impl.choice_for(launches.kind("forward")))[1] == 2


def tiles() -> set[Choice]:
    return {Choice(c.queries, c.keys, 4, 2) for kind in kinds() for c in candidates(kind)}


@pytest.mark.parametrize("choice", sorted(tiles()), ids=lambda c: f"{c.queries}x{c.keys}")
def test_every_size_of_a_tile(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_impl, "choice_for", lambda kind: choice)
    check(make_inputs(Shape(1, 16, [choice.queries + 3], [choice.keys + 5]), p=0.25))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.7])
def test_any_scale(scale: float) -> None:
    check(make_inputs(Shape(1, 32, [9], [35]))._replace(scale=scale))


def test_tokens_of_any_strides() -> None:
    inputs = make_inputs(ORDINARY)
    apart = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in inputs[:3]]
    odd = [torch.cat([x.flatten(1), x.flatten(1)[:, :3]], 1)[:, 1:33].unflatten(1, (1, 32)) for x in inputs[:3]]
    for tensors in (apart, odd):
        check(AttentionInputs(*tensors, *inputs[3:]))


def test_large_scores_do_not_overflow() -> None:
    inputs = make_inputs(ORDINARY)
    inputs = inputs._replace(query=inputs.query * 1e4)
    out, *grads = gradients(call, inputs, torch.ones_like(inputs.query))
    assert all(x.isfinite().all() for x in (out, *grads))
    torch.testing.assert_close(out.double(), oracle(in_double(inputs)), atol=0.05, rtol=0.05)


def test_one_images_not_a_number_stays_there() -> None:
    inputs = make_inputs(Shape(1, 32, [5, 6, 7], [40, 33, 20]))
    inputs.key[45] = inputs.value[50] = inputs.query[7] = float("nan")
    out, *grads = gradients(call, inputs, torch.ones_like(inputs.query))
    queries, keys = [x.split([5, 6, 7]) for x in (out, grads[0])], [x.split([40, 33, 20]) for x in grads[1:]]
    assert all(x[0].isfinite().all() and x[2].isfinite().all() for x in queries + keys)
    assert queries[0][1].isnan().all()


def test_an_image_is_the_same_alone_and_among_others() -> None:
    inputs = make_inputs(Shape(1, 32, [37, 5, 64], [70, 33, 64]))
    alone = AttentionInputs(
        *(x[s] for x, s in zip(inputs[:3], (slice(37, 42), slice(70, 103), slice(70, 103)), strict=True)),
        TokenOffsets.of([5], "cpu"),
        TokenOffsets.of([33], "cpu"),
        *inputs[5:],
    )
    torch.testing.assert_close(call(alone), call(inputs)[37:42], atol=1e-6, rtol=1e-6)


def test_the_same_bits_in_every_run() -> None:
    inputs = make_inputs(SPLIT, p=0.1)
    grad = torch.randn_like(inputs.query)
    first, second = (gradients(call, inputs, grad) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_everything_dropped_is_zero() -> None:
    inputs = make_inputs(ORDINARY, p=1.0)
    for x in gradients(call, inputs, torch.ones_like(inputs.query)):
        assert (x == 0).all()


def test_tuning_measures_every_candidate() -> None:
    from detr_fast.ops.attention import triton_tuning

    clock = itertools.count(100, -1)
    inputs = make_inputs(Shape(1, 32, [20], [20]), p=0.1)
    chosen = triton_tuning.tune_attention(on_device(inputs), measure=lambda run: [run(), next(clock)][1])
    assert {kind.kernel for kind in chosen} == {"forward", "query_gradient", "key_value_gradient"}
    for kind, choice in chosen.items():
        assert choice == candidates(kind)[-1], "the clock goes backwards: the last is the fastest"
        assert triton_impl.choice_for(kind) == choice
    check(inputs)
