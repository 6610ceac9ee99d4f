"""Attention: the reference against PyTorch's own in float64, every backend of the CPU against both, and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detr_fast.ops import Dropout, TokenOffsets, attention, attention_weights
from detr_fast.ops.attention.api import OP, as_schema
from detr_fast.ops.attention.types import AttentionInputs
from ops.attention_cases import (
    ORDINARY,
    SHAPES,
    Shape,
    assert_as_exact_as,
    gradients,
    in_double,
    make_inputs,
    oracle,
)

CPU = torch.device("cpu")
# Triton's needs a process of its own: test_attention_triton.py.
BACKENDS = [name for name, reason in OP.reasons(CPU).items() if reason is None and name != "triton"]


def call(inputs: AttentionInputs, backend: str | None = None) -> Tensor:
    *tensors, scale, dropout = inputs
    return attention(*tensors, scale=scale, dropout=dropout, backend=backend)


def check(inputs: AttentionInputs, backend: str | None) -> None:
    grad = torch.randn(inputs.query.shape).to(inputs.query.dtype)
    exact = gradients(oracle, in_double(inputs), grad.double())
    theirs = gradients(oracle, inputs, grad)
    ours = gradients(lambda x: call(x, backend), inputs, grad)
    assert exact[0].numel() < 100 or sum(inputs.key_offsets.lengths) == 0 or exact[0].std() > 0.1, "nothing to see"
    assert_as_exact_as(ours, theirs, exact, f"of {backend}")


@pytest.mark.parametrize("p", [None, 0.25])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_as_exact_as_sdpa(backend: str, shape: Shape, p: float | None) -> None:
    if backend == "sdpa" and p is not None:
        return  # has a test of its own: it refuses
    check(make_inputs(shape, p=p), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [None, 0.25])
@pytest.mark.parametrize("backend", ["reference", None])
def test_dtypes(backend: str | None, p: float | None, dtype: torch.dtype) -> None:
    check(make_inputs(ORDINARY, dtype, p), backend)


def test_the_reference_in_double_is_sdpa() -> None:
    for p in (None, 0.5):
        inputs = in_double(make_inputs(ORDINARY, p=p))
        grad = torch.randn_like(inputs.query)
        ours = gradients(lambda x: call(x, "reference"), inputs, grad)
        for x, y in zip(ours, gradients(oracle, inputs, grad), strict=True):
            torch.testing.assert_close(x, y, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_any_strides(backend: str) -> None:
    inputs = make_inputs(ORDINARY)
    apart = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in inputs[:3]]  # not contiguous in the last one
    torch.testing.assert_close(call(AttentionInputs(*apart, *inputs[3:]), backend), call(inputs, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str) -> None:
    inputs = make_inputs(ORDINARY)
    inputs = inputs._replace(query=inputs.query * 1e4)
    out, *grads = gradients(lambda x: call(x, backend), inputs, torch.ones_like(inputs.query))
    assert all(x.isfinite().all() for x in (out, *grads))
    # Its largest scores are ten thousands: four ulp of them, of which the exponential makes a relative error.
    torch.testing.assert_close(out.double(), oracle(in_double(inputs)), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_images_not_a_number_stays_there(backend: str) -> None:
    inputs = make_inputs(Shape(2, 32, [5, 6, 7], [40, 33, 20]))
    inputs.key[45] = inputs.value[50] = inputs.query[7] = float("nan")
    out, *grads = gradients(lambda x: call(x, backend), inputs, torch.ones_like(inputs.query))
    queries, keys = [x.split([5, 6, 7]) for x in (out, grads[0])], [x.split([40, 33, 20]) for x in grads[1:]]
    assert all(x[0].isfinite().all() and x[2].isfinite().all() for x in queries + keys)
    assert queries[0][1].isnan().all()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_an_image_is_the_same_alone_and_among_others(backend: str | None) -> None:
    inputs = make_inputs(Shape(2, 32, [37, 5, 64], [70, 33, 64]))
    together = call(inputs, backend)
    alone = AttentionInputs(
        *(x[s] for x, s in zip(inputs[:3], (slice(37, 42), slice(70, 103), slice(70, 103)), strict=True)),
        TokenOffsets.of([5], CPU),
        TokenOffsets.of([33], CPU),
        *inputs[5:],
    )
    torch.testing.assert_close(call(alone, backend), together[37:42], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_same_bits_in_every_run(backend: str | None) -> None:
    inputs = make_inputs(ORDINARY, p=0.1)
    grad = torch.randn_like(inputs.query)
    first, second = (gradients(lambda x: call(x, backend), inputs, grad) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_everything_dropped_is_zero() -> None:
    for backend in (None, "reference"):
        inputs = make_inputs(ORDINARY, p=1.0)
        for x in gradients(lambda i, b=backend: call(i, b), inputs, torch.ones_like(inputs.query)):
            assert (x == 0).all()


def test_gradcheck() -> None:
    inputs = in_double(make_inputs(Shape(2, 3, [2, 3], [4, 2]), p=0.3))
    leaves = [x.detach().contiguous().requires_grad_() for x in inputs[:3]]
    assert torch.autograd.gradcheck(lambda *x: call(AttentionInputs(*x, *inputs[3:]), "reference"), leaves)


def test_sdpa_takes_no_dropout() -> None:
    inputs = make_inputs(ORDINARY, p=0.1)
    with pytest.raises(NotImplementedError, match="attention cannot run with backend='sdpa': SDPA draws its dropout"):
        call(inputs, "sdpa")


class TestWeights:
    def test_are_what_values_are_multiplied_with(self) -> None:
        inputs = make_inputs(Shape(2, 32, [37, 5, 2], [70, 33, 0]))
        weights = attention_weights(inputs.query, inputs.key, inputs.query_offsets, inputs.key_offsets)
        assert [list(w.shape) for w in weights] == [[2, 37, 70], [2, 5, 33], [2, 2, 0]]
        values = inputs.value.split([70, 33, 0])
        out = torch.cat([(w @ v.transpose(0, 1)).transpose(0, 1) for w, v in zip(weights, values, strict=True)])
        torch.testing.assert_close(out, oracle(inputs), atol=1e-5, rtol=1e-5)

    def test_of_chosen_queries(self) -> None:
        inputs = make_inputs(ORDINARY)
        arguments = (inputs.query, inputs.key, inputs.query_offsets, inputs.key_offsets)
        chosen = [torch.tensor([3, 36, 3]), torch.tensor([], dtype=torch.int64)]
        some, every = attention_weights(*arguments, queries=chosen, scale=0.3), attention_weights(*arguments, scale=0.3)
        for x, y, which in zip(some, every, chosen, strict=True):
            torch.testing.assert_close(x, y[:, which])

    def test_rejects_bad_input(self) -> None:
        inputs = make_inputs(ORDINARY)
        arguments = (inputs.query, inputs.key, inputs.query_offsets, inputs.key_offsets)
        with pytest.raises(ValueError, match="queries must have one tensor for each of 2 images, got 1"):
            attention_weights(*arguments, queries=[torch.tensor([1])])
        with pytest.raises(ValueError, match=r"queries of image 1 must be int64 \[M\], got torch.bool \[5\]"):
            attention_weights(*arguments, queries=[torch.tensor([1]), torch.ones(5, dtype=torch.bool)])


def test_offsets() -> None:
    offsets = TokenOffsets.of([3, 0, 2], CPU)
    assert (offsets.lengths, offsets.offsets.tolist()) == ((3, 0, 2), [0, 3, 3, 5])
    assert (offsets.max_length, offsets.total, offsets.offsets.dtype) == (3, 5, torch.int32)
    equal = TokenOffsets.equal(3, 4, CPU)
    assert equal.lengths == (4, 4, 4) and torch.equal(equal.offsets, TokenOffsets.of([4] * 3, CPU).offsets)
    assert TokenOffsets.of([], CPU).max_length == 0


BAD_INPUT: list[tuple[dict[str, Any], str]] = [
    ({"query": torch.zeros(42, 64)}, r"query must be float \[Nq, H, E\], got torch.float32 \[42, 64\]"),
    ({"query": torch.zeros(42, 2, 0)}, r"query must have heads and a head size, got \[42, 2, 0\]"),
    ({"key": torch.zeros(103, 2, 16)}, r"key must be \[Nk, 2, 32\], got \[103, 2, 16\]"),
    ({"value": torch.zeros(103, 1, 32)}, r"value must be \[Nk, 2, 32\], got \[103, 1, 32\]"),
    ({"value": torch.zeros(103, 2, 32).half()}, "value must be torch.float32 on cpu, .* got torch.float16 on cpu"),
    ({"value": torch.zeros(99, 2, 32)}, "key and value must be of the same tokens, got 103 and 99"),
    ({"query_offsets": TokenOffsets.of([37, 6], CPU)}, "query_offsets must be of the 42 tokens of query, got 43"),
    ({"key_offsets": TokenOffsets.of([105, -2], CPU)}, r"key_offsets.lengths must not be negative, got \[105, -2\]"),
    (
        {"key_offsets": TokenOffsets((70, 33), torch.tensor([0, 70, 103]))},
        r"key_offsets.offsets must be int32 \[3\] on cpu, got torch.int64 \[3\] on cpu",
    ),
    (
        {"key_offsets": TokenOffsets.of([103], CPU)},
        "query_offsets and key_offsets must be of the same images, got 2",
    ),
    ({"dropout": Dropout(0.5, torch.zeros(1))}, "dropout.seed must be int64"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_INPUT)
def test_rejects_bad_input(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make_inputs(ORDINARY)._replace(**changed))


class TestUnderTorch:
    """torch.compile and torch.export see one node."""

    @pytest.mark.parametrize("p", [None, 0.25])
    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_opcheck(self, backend: str | None, p: float | None) -> None:
        inputs = make_inputs(Shape(2, 32, [37, 5, 4], [70, 33, 0]), p=p)
        leaves = [x.requires_grad_() for x in inputs[:3]]
        schema = as_schema(AttentionInputs(*leaves, *inputs[3:]))
        torch.library.opcheck(torch.ops.detr_fast.attention, (*schema, backend))

    def test_compile_is_one_node_and_the_same(self) -> None:
        graphs = []

        def note(graph: torch.fx.GraphModule, example: list) -> Any:
            graphs.append(graph)
            return graph

        compiled = torch.compile(call, fullgraph=True, backend=note)
        for p in (None, 0.25):
            inputs = make_inputs(ORDINARY, p=p)
            grad = torch.randn_like(inputs.query)
            ours, eager = (gradients(f, inputs, grad) for f in (compiled, call))
            for x, y in zip(ours, eager, strict=True):
                torch.testing.assert_close(x, y)
        for graph in graphs:
            calls = [n.target for n in graph.graph.nodes if n.op == "call_function" and "detr_fast" in str(n.target)]
            assert calls == [torch.ops.detr_fast.attention]

    def test_other_lengths_do_not_compile_anew_for_ever(self) -> None:
        count = 0

        def note(graph: torch.fx.GraphModule, example: list) -> Any:
            nonlocal count
            count += 1
            return graph

        compiled = torch.compile(call, fullgraph=True, backend=note)
        for lengths in ([37, 5], [20, 21], [33, 8], [4, 11], [50, 60]):
            inputs = make_inputs(Shape(2, 32, lengths, [n + 2 for n in lengths]))
            torch.testing.assert_close(compiled(inputs), call(inputs))
        assert count <= 2, "once, and once more when it sees that lengths change"

    def test_export(self) -> None:
        class Module(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                offsets = TokenOffsets.equal(2, x.shape[0] // 2, x.device)
                return attention(x, x, x, offsets, offsets)

        x = torch.randn(8, 2, 32)
        exported = torch.export.export(Module(), (x,))
        assert str(exported.graph).count("torch.ops.detr_fast.attention.default") == 1
        torch.testing.assert_close(exported.module()(x), Module()(x))
