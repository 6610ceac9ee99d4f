"""Trained models as files for other runtimes: ONNX, and PyTorch's exported programs.

The graph is ``PortableDetr``'s. Its inputs are ``images`` [B, 3, H, W] float32, normalised as in training, and with
padding ``sizes`` [B, 2] int64, the height and width of each image, which lies in the top left corner. B, H and W are
free. Its outputs are ``pred_logits`` [B, Q, C + 1], ``pred_boxes`` [B, Q, 4] and, of a model with a mask head,
``pred_masks`` [B, Q, H / 4, W / 4], logits that are to be resized. What a caller needs besides (categories, mean and
standard deviation, sizes) stands in the file's metadata, under ``detr_fast`` and as JSON.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.build import CheckpointMeta, model_from_checkpoint
from detr_fast.checkpoint import prepare_output_folder
from detr_fast.data.batch import ImageBatch
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from detr_fast.models.detr import detect
from detr_fast.models.portable import PortableDetr

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
# The first with an operator for the whole of attention is 23, which runtimes of before 2025 do not read.
DEFAULT_OPSET = 18
OPSETS = range(18, 24)
# (batch, height, width) that a file is checked on: another batch, a side that no stride divides, one that all do, maps
# of one cell a side.
CHECKED_SIZES = ((1, 128, 192), (2, 203, 150), (3, 97, 161), (1, 15, 90), (2, 90, 16))
# Two float32 implementations of DETR differ by about 1e-5 in logits of about 10, and by 1e-4 in a mask's.
TOLERANCE = 1e-3
METADATA_KEY = "detr_fast"
OUTPUTS = ("pred_logits", "pred_boxes", "pred_masks")

Run = Callable[..., Mapping[str, Tensor]]


class ExportError(ValueError):
    """A written file that does not give what the model gives; the message says by how much."""


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        path: the file.
        differences: the largest difference of each output from the model's, over all sizes; None: not verified.
        note: why it was not verified, or "".
    """

    path: Path
    differences: dict[str, float] | None
    note: str = ""

    def render(self) -> str:
        """Say it in a few lines."""
        size = f"{self.path} written, {self.path.stat().st_size / 2**20:.1f} MiB"
        if self.differences is None:
            return f"{size}; not verified: {self.note}"
        sizes = ", ".join(f"{batch}x3x{height}x{width}" for batch, height, width in CHECKED_SIZES)
        found = ", ".join(f"{name} {difference:.1e}" for name, difference in self.differences.items())
        return f"{size}\nverified on {sizes}; largest difference from the model: {found}"


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = "onnx",
    padding: bool = False,
    opset: int = DEFAULT_OPSET,
    model_options: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Export the model of a checkpoint and compare the file's answers with the model's.

    Args:
        checkpoint: ours or the original's.
        output: the file; None: the checkpoint's name with the format's suffix.
        format, padding, opset: as of ``export_model``.
        model_options: what the file does not tell about its model, such as ``{"dilation": True}``.

    Raises:
        ModuleNotFoundError: a package is missing; the message names the extra that brings it.
        ExportError: the file's answers are not the model's; it is deleted.
        CheckpointError, ValueError: as of ``model_from_checkpoint`` and ``export_model``.
    """
    _check(format, opset)
    model, meta = model_from_checkpoint(checkpoint, **(model_options or {}))
    path = Path(checkpoint).with_suffix(SUFFIXES[format]) if output is None else Path(output)
    export_model(model, path, format=format, padding=padding, opset=opset, metadata=metadata_of(meta))
    if format == "onnx" and find_spec("onnxruntime") is None:
        return ExportReport(path, None, "onnxruntime is missing (pip install 'detr_fast[export]')")
    try:
        return ExportReport(path, verify(model, path, format=format, padding=padding))
    except ExportError:
        path.unlink()
        raise


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    padding: bool = False,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model for another runtime.

    Args:
        model: a ``Detr`` or ``DetrSegm``, on any device; left as it is.
        path: the file, written whole or not at all.
        format: "onnx" (run by ONNX Runtime, OpenVINO, TensorRT, ...) or "torch-export" (``torch.export.load``).
        padding: give the graph the second input ``sizes``, for batches of images of different sizes. Without it
            attention has no mask and is faster.
        opset: version of ONNX's operators, 18 to 23; 23 has attention as one operator.
        metadata: written into the file as JSON.

    Raises:
        ModuleNotFoundError: "onnx" needs the packages of the extra ``export``.
        TypeError: the model is of another kind.
        ValueError: ``format`` or ``opset`` is not as above.
    """
    _check(format, opset)
    program = _trace(PortableDetr(model).float().cpu().eval(), padding)
    contents = json.dumps(dict(metadata or {}))
    prepare_output_folder(Path(path).parent)
    with _whole(Path(path)) as partial:
        if format == "onnx":
            _save_onnx(program, partial, padding, opset, contents)
        else:
            torch.export.save(program, partial, extra_files={METADATA_KEY: contents})


def metadata_of(meta: CheckpointMeta) -> dict[str, Any]:
    """What a caller of the file needs to know besides its inputs and outputs."""
    sizes = {"size": max(meta.args.get("scales") or [800]), "max_size": meta.args.get("max_size") or 1333}
    labels = {"categories": meta.categories, "is_thing": meta.is_thing_map}
    return {**labels, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, **sizes}


def verify(
    model: nn.Module, path: str | os.PathLike[str], *, format: str = "onnx", padding: bool = False
) -> dict[str, float]:
    """Compare a written file with the model it was made of, on random images of ``CHECKED_SIZES``.

    Returns:
        For each output the largest difference of an element.

    Raises:
        ModuleNotFoundError: "onnx" needs onnxruntime.
        ExportError: a difference is above ``TOLERANCE`` of the output's largest value (or of 1, if that is larger).
    """
    run = _onnx_runner(path) if format == "onnx" else _program_runner(path)
    reference = copy.deepcopy(model).float().cpu().eval()
    differences: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for shape in CHECKED_SIZES:
        inputs = _example(*shape, padding, generator)
        expected = _answer(reference, *inputs)
        for name, answer in run(*inputs).items():
            difference = float((answer - expected[name]).abs().max())
            # Not "difference > limit": NaN must not pass.
            if not difference <= TOLERANCE * max(1.0, float(expected[name].abs().max())):
                raise ExportError(f"{path} differs from the model: {name} by {difference:.3g} at {list(shape)}")
            differences[name] = max(differences.get(name, 0.0), difference)
    return differences


def _check(format: str, opset: int) -> None:
    if format not in SUFFIXES:
        raise ValueError(f"format must be one of {', '.join(SUFFIXES)}, got {format!r}")
    if opset not in OPSETS:
        raise ValueError(f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    missing = [name for name in ("onnx", "onnxscript") if format == "onnx" and find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX export needs {' and '.join(missing)}: pip install 'detr_fast[export]'")


def _trace(model: PortableDetr, padding: bool) -> torch.export.ExportedProgram:
    free = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {"images": {0: free, 2: free, 3: free}, "sizes": {0: free} if padding else None}
    # Where a size of the example is 1, or two of them are equal, a graph could be for such sizes only.
    inputs = _example(2, 224, 288, padding, torch.Generator())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own code
        program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    _accept_single_cells(program)
    return program


def _accept_single_cells(program: torch.export.ExportedProgram) -> None:
    """Take from a program what tracing assumed of sizes: that every map has at least two cells a side.

    Its graph holds for one cell, too, as ``verify`` shows. What is left are upper bounds, as of learned positions.
    There is no public way: bounds that are asked for are refused where tracing assumed others.
    """
    bounds: dict[Any, Any] = program._range_constraints
    for symbol, bound in bounds.items():
        bounds[symbol] = type(bound)(1, bound.upper)
    if hasattr(program, "_guards_code"):  # from torch 2.9 on
        program._guards_code = []


def _save_onnx(program: torch.export.ExportedProgram, path: Path, padding: bool, opset: int, metadata: str) -> None:
    with _quiet_exporter():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["images", "sizes"][: 1 + padding],
            output_names=OUTPUTS[: len(program.graph_signature.user_outputs)],
            verbose=False,
        )
    assert exported is not None
    graph = exported.model.graph
    parts: list[Any] = [*graph.inputs, *graph.outputs, *graph.all_nodes()]
    for part in parts:
        part.metadata_props.clear()  # among them stack traces, with the paths of this machine
    _name_axes(graph)
    exported.model.metadata_props[METADATA_KEY] = metadata
    exported.save(path)


def _name_axes(graph: Any) -> None:
    """Give the free axes of a graph the names that its callers know, in place of the tracer's symbols."""
    names = {str(graph.inputs[0].shape[axis]): name for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    if len(graph.outputs) == len(OUTPUTS):  # masks, whose sides are expressions of the images'
        names |= {str(graph.outputs[2].shape[axis]): name for axis, name in ((2, "mask_height"), (3, "mask_width"))}
    values = [*graph.inputs, *graph.outputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    symbol = re.compile(r"\bs\d+\b")
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, int) or str(size) == "None":
                continue
            name = names.get(str(size)) or symbol.sub(lambda found: names.get(found[0], found[0]), str(size))
            value.shape[axis] = name


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the warnings that operators of torchvision are not there, which no model of ours has."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own code
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` when all of it is there."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder) / path.name
        yield partial
        os.replace(partial, path)


def _example(
    batch: int, height: int, width: int, padding: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Random images and, with padding, their sizes: the first fills the frame, the others are smaller."""
    images = torch.randn(batch, 3, height, width, generator=generator)
    if not padding:
        return images, None
    sizes = torch.tensor([[height - height // 3 * (i > 0), width - width // 4 * (i > 1)] for i in range(batch)])
    for image, (h, w) in zip(images, sizes.tolist(), strict=True):
        image[:, h:] = 0
        image[:, :, w:] = 0
    return images, sizes


def _answer(model: nn.Module, images: Tensor, sizes: Tensor | None) -> dict[str, Tensor]:
    samples = images if sizes is None else [x[:, :h, :w] for x, (h, w) in zip(images, sizes.tolist(), strict=True)]
    with torch.inference_mode():
        outputs = detect(model, ImageBatch.of(samples))
        masks = outputs.get("pred_masks")
        return outputs if masks is None else {**outputs, "pred_masks": masks.dense()}


def _onnx_runner(path: str | os.PathLike[str]) -> Run:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install 'detr_fast[export]'") from error
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]

    def run(images: Tensor, sizes: Tensor | None) -> dict[str, Tensor]:
        feed = {"images": images.numpy()} | ({} if sizes is None else {"sizes": sizes.numpy()})
        return {name: torch.from_numpy(x) for name, x in zip(names, session.run(names, feed), strict=True)}

    return run


def _program_runner(path: str | os.PathLike[str]) -> Run:
    return torch.export.load(os.fspath(path)).module()
