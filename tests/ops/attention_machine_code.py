"""What every configuration of the attention kernels takes of a GPU: compiled once, kept in tests/data, and compared.

To compile all of them takes half an hour. After a change of a kernel or of the candidates, write the file again:

    PYTHONPATH=.:tests python tests/ops/attention_machine_code.py

which goes on where it was stopped.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from detr_fast.ops.attention import triton_choices, triton_impl
from detr_fast.ops.attention.triton_choices import Choice
from ops.attention_cases import Shape, make_inputs
from ops.triton_machine_code import ARCHITECTURES, Launch, Recorder, compile_launch, resources

PACKAGE = Path(triton_impl.__file__).parent
SOURCES = (
    PACKAGE / "triton_forward.py",
    PACKAGE / "triton_backward.py",
    PACKAGE / "triton_tiles.py",
    PACKAGE.parent / "_triton_dropout.py",
)
RECORD = Path(__file__).parents[1] / "data" / "attention_machine_code.json"
KERNELS = {
    "forward": "attention_fwd_kernel",
    "query_gradient": "attention_bwd_query_kernel",
    "key_value_gradient": "attention_bwd_key_value_kernel",
    "reduce": "attention_fwd_reduce_kernel",
}
# The kernel that sums a split pass has one configuration: queries of a block, and what Triton takes where none is said.
REDUCE = Choice(triton_impl.REDUCE_BLOCK, 0, 4, 3)


class Configuration(NamedTuple):
    """What is compiled; a kind's ``short`` picks its candidates, and is no part of it."""

    kernel: str
    block_e: int
    dtype: str
    dropout: bool
    choice: Choice
    split: bool
    architecture: int

    def __str__(self) -> str:
        yes = [name for name in ("dropout", "split") if getattr(self, name)]
        tiles = "x".join(str(number) for number in self.choice)
        return " ".join([f"sm_{self.architecture}", self.kernel, str(self.block_e), self.dtype, tiles, *yes])


def configurations() -> Iterator[Configuration]:
    """Every one that may be launched, once."""
    found: dict[Configuration, None] = {}
    for kind in triton_choices.kinds():
        dtype = str(kind.dtype).removeprefix("torch.")
        for choice, architecture in itertools.product(triton_choices.candidates(kind), ARCHITECTURES):
            for split in (False, True)[: 1 if kind.kernel == "key_value_gradient" else 2]:
                found[Configuration(*kind[:2], dtype, kind.dropout, choice, split, architecture)] = None
            found[Configuration("reduce", kind.block_e, dtype, False, REDUCE, True, architecture)] = None
    yield from found


def launch_of(configuration: Configuration) -> Launch:
    """The launch of a configuration, recorded."""
    kernel, block_e, dtype, dropout, choice, split, _ = configuration
    # A split pass has few programs and many keys; the tokens of the others are too few to be split.
    inputs = make_inputs(
        Shape(1, block_e, [20], [600 if split else 20]), getattr(torch, dtype), 0.1 if dropout else None
    )
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS.values():
            patch.setattr(triton_impl, name, Recorder(getattr(triton_impl, name), launches))
        patch.setattr(triton_impl, "choice_for", lambda kind: choice)
        _call(kernel, triton_impl.Launches(inputs))
    (launch,) = (found for found in launches if found.kernel.__name__ == KERNELS[kernel])
    assert launch.constants.get("SPLIT", split) == split
    return launch


def _call(kernel: str, calls: triton_impl.Launches) -> None:
    if kernel in ("forward", "reduce"):
        calls.forward()
        return
    grad = calls.query.contiguous()
    logarithms = torch.zeros(calls.heads, calls.all_queries)
    if kernel == "query_gradient":
        calls.query_gradient(grad, grad, logarithms, logarithms)
    else:
        calls.key_value_gradient(grad, logarithms, logarithms)


def measure(configuration: Configuration, folder: Path) -> list[int]:
    """Registers of a thread, bytes of them that were spilled, bytes of shared memory."""
    compiled = compile_launch(launch_of(configuration), configuration.architecture)
    assert f".target sm_{configuration.architecture}" in compiled.asm["ptx"]
    used = resources(compiled, folder)
    return [used["REG"], used["STACK"] + used["LOCAL"], max(used["SHARED"], compiled.metadata.shared)]


def sources_hash() -> str:
    """Of the kernels' syntax: neither comments nor docstrings make machine code."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.Module)) and ast.get_docstring(node) is not None:
                del node.body[0]
    return hashlib.sha256("".join(ast.dump(tree) for tree in trees).encode()).hexdigest()


def read() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def write(limit: int) -> int:
    """Compile up to ``limit`` configurations that the file does not have of these sources; how many are left."""
    import triton

    head = {"sources": sources_hash(), "triton": triton.__version__}
    found = read() if RECORD.exists() else {}
    rows = found.get("rows", {}) if {name: found.get(name) for name in head} == head else {}
    left = [c for c in configurations() if str(c) not in rows]
    with tempfile.TemporaryDirectory() as folder:
        for configuration in left[:limit]:
            rows[str(configuration)] = measure(configuration, Path(folder))
    names = [str(c) for c in configurations()]
    head["rows"] = {name: rows[name] for name in names if name in rows}
    lines = json.dumps(head).replace('], "', '],\n "').replace('"rows": {', '"rows": {\n ')
    RECORD.write_text(lines + "\n")
    return max(0, len(left) - limit)


if __name__ == "__main__":
    print(write(int(sys.argv[1]) if len(sys.argv) > 1 else 10**6), "left")
