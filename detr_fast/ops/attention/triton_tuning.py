"""Measures the candidates of the attention kernels on this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.testing

from detr_fast.ops._triton import on_device
from detr_fast.ops.attention.triton_choices import Choice, Kind, candidates, choice_for, set_choice
from detr_fast.ops.attention.triton_impl import Launches
from detr_fast.ops.attention.types import AttentionInputs

Measure = Callable[[Callable[[], object]], float]


def tune_attention(inputs: AttentionInputs, measure: Measure = triton.testing.do_bench) -> dict[Kind, Choice]:
    """Set the fastest candidates of the three kernels for calls of this kind; what was chosen.

    Nothing is tuned unless this is called: a first training step does not take longer for it, and no run differs from
    the one before. ``save_choices`` and ``load_choices`` (triton_choices.py) keep what was found in a file.

    Args:
        inputs: a typical call, on the device to tune for.
        measure: a function's time, in any unit; waits for the device.
    """
    launches = Launches(inputs)
    chosen: dict[Kind, Choice] = {}
    with on_device(inputs.query.device):
        out, statistics = launches.forward()
        delta = torch.zeros_like(statistics)
        runs: dict[str, Callable[[], object]] = {
            "forward": launches.forward,
            "query_gradient": lambda: launches.query_gradient(out, out, statistics, delta),
            "key_value_gradient": lambda: launches.key_value_gradient(out, statistics, delta),
        }
        for kernel, run in runs.items():
            kind = launches.kind(kernel)
            chosen[kind] = _fastest(kind, run, measure)
            set_choice(kind, chosen[kind])
    return chosen


def _fastest(kind: Kind, run: Callable[[], object], measure: Measure) -> Choice:
    before, times = choice_for(kind), {}
    for choice in candidates(kind):
        set_choice(kind, choice)
        times[choice] = measure(run)
    set_choice(kind, before)
    return min(times, key=lambda choice: times[choice])
