"""What is installed here, and which implementation every op takes: the text of ``detr-fast info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from detr_fast.ops import _native
from detr_fast.ops._dispatch import Op
from detr_fast.ops.add_layer_norm.api import OP as ADD_LAYER_NORM
from detr_fast.ops.assignment.api import AUCTION
from detr_fast.ops.assignment.api import OP as ASSIGNMENT
from detr_fast.ops.attention.api import OP as ATTENTION
from detr_fast.ops.conv.api import OP as CONV
from detr_fast.ops.conv_blocks.api import OP as CONV_BLOCKS
from detr_fast.ops.conv_int8.api import OP as CONV_INT8
from detr_fast.ops.conv_max_pool.api import OP as CONV_MAX_POOL
from detr_fast.ops.mask_argmax.api import OP as MASK_ARGMAX
from detr_fast.ops.mask_loss.api import OP as MASK_LOSS
from detr_fast.ops.mask_threshold.api import OP as MASK_THRESHOLD
from detr_fast.ops.matching.api import OP as MATCHING
from detr_fast.ops.matching_cost.api import OP as MATCHING_COST
from detr_fast.ops.relu_dropout.api import OP as RELU_DROPOUT
from detr_fast.ops.residual_block.api import OP as RESIDUAL_BLOCK
from detr_fast.ops.set_criterion.api import OP as SET_CRITERION
from detr_fast.ops.set_loss.api import OP as SET_LOSS
from detr_fast.ops.transformer_layers.api import OP as TRANSFORMER_LAYERS

OPS = (
    ATTENTION,
    ADD_LAYER_NORM,
    RELU_DROPOUT,
    MATCHING_COST,
    ASSIGNMENT,
    AUCTION,
    MATCHING,
    SET_LOSS,
    SET_CRITERION,
    MASK_LOSS,
    MASK_ARGMAX,
    CONV,
    CONV_BLOCKS,
    CONV_INT8,
    CONV_MAX_POOL,
    RESIDUAL_BLOCK,
    TRANSFORMER_LAYERS,
    MASK_THRESHOLD,
)

PACKAGES = ("detr_fast", "torch", "numpy", "scipy", "triton", "torchvision", "pillow", "hotcoco", "safetensors")


def collect_info() -> dict[str, Any]:
    """Versions, devices, the native module, and for every op and device the implementation and why not the others.

    Returns:
        ``{"versions": {name: version or None}, "devices": {name: description}, "no_cuda": reason or None,
        "native": {...}, "ops": {op: {device: {"takes": name, "cannot": {name: reason}}}}}``; can be written as JSON.
    """
    devices = _devices()
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "devices": devices,
        "no_cuda": _why_no_cuda(),
        "native": _native_module(),
        "ops": {op.name: {device: _selection(op, torch.device(device)) for device in devices} for op in OPS},
    }


def render_info() -> str:
    """``collect_info`` as text for a person."""
    found = collect_info()
    lines = ["Versions"]
    lines += [f"  {name:<12} {version or 'not installed'}" for name, version in found["versions"].items()]
    lines += ["", "Devices"]
    lines += [f"  {name:<12} {description}" for name, description in found["devices"].items()]
    if found["no_cuda"]:
        lines.append(f"  {'cuda':<12} none: {found['no_cuda']}")
    lines += ["", "Native module"]
    lines += [f"  {name:<12} {value}" for name, value in found["native"].items() if value is not None]
    lines += ["", "Ops: the implementation each takes, and why another cannot run"]
    for op, selections in found["ops"].items():
        for device, selection in selections.items():
            lines.append(f"  {op:<14} on {device}: {selection['takes']}")
            lines += [f"  {'':<14}   not {name}: {reason}" for name, reason in selection["cannot"].items()]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # says which build it is, which the metadata of some wheels do not
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{_cpu_name()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        devices[f"cuda:{index}"] = f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _why_no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return f"torch, built for CUDA {torch.version.cuda}, finds no driver or no GPU"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor whose kernel writes no such line
        return platform.processor() or platform.machine()


def _native_module() -> dict[str, str | None]:
    module, why_not, _ = _native.load()
    if module is None:
        return {"state": f"absent: {why_not}", "compiler": None, "cuda": None}
    cuda = f"{module.cuda} for {module.cuda_architectures}" if module.cuda else "not built in"
    return {"state": "loaded", "compiler": module.compiler, "cuda": cuda}


def _selection(op: Op, device: torch.device) -> dict[str, Any]:
    reasons = op.reasons(device)
    takes = next(name for name, reason in reasons.items() if reason is None)
    return {"takes": takes, "cannot": {name: reason for name, reason in reasons.items() if reason is not None}}
