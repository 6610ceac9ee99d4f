"""Checkpoint files: read without running what is in them, written so that a crash cannot destroy the old one.

Layout, the original DETR's plus our own entries: ``model``, ``optimizer``, ``lr_scheduler``, ``epoch`` (the last
finished one, -1 before that), ``args`` (a plain dict with the original's option names), ``categories`` {id: name},
``is_thing_map`` {id: whether it is a thing, not stuff}, ``ema`` (averaged weights under the names of ``model``, or
None), ``best`` (highest AP so far, or None), ``step`` and ``random_state``.
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ZIP_MAGIC = b"PK\x03\x04"  # torch.save since 1.6
_PICKLE_MAGIC = b"\x80\x02"  # torch.save before that
_LFS_MAGIC = b"version https://git-lfs"


class CheckpointError(Exception):
    """A checkpoint cannot be read, written or loaded into this model; the message names the file or the key."""


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of ours, of the original DETR, or a bare state dict, to the CPU.

    Nothing in the file is executed: only tensors, plain containers and ``argparse.Namespace`` are accepted.

    Args:
        path: a ``.pth`` file (``torch.save``), or a ``.safetensors`` file, which becomes ``model``.

    Returns:
        The file's entries. ``model`` is always there; ``args`` is always a dict, {} where the file has none.

    Raises:
        CheckpointError: the file is missing, empty, truncated, something else, asks to run code, or has no weights.
    """
    path = Path(path)
    head = _read_head(path)
    if path.suffix == ".safetensors":
        contents: Any = {"model": _load_safetensors(path)}
    elif head.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        contents = _load_torch(path)
    elif head.startswith(_LFS_MAGIC):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the checkpoint itself: fetch it with `git lfs pull`")
    else:
        raise CheckpointError(
            f"{path} is not a checkpoint: expected a torch.save file, its first bytes are {head[:16]!r}"
        )
    return _with_model_and_args(contents, path)


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path} is empty")
    return head


def _load_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, KeyError, ... by where it lies
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise CheckpointError(
                f"{path} is refused: it holds a pickled {refused[1].rstrip('.,')}, which could run code; "
                "only tensors, plain containers and argparse.Namespace are read"
            ) from error
        raise CheckpointError(f"{path} is truncated or damaged: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    """The line of torch's long messages that says what happened."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Check the doc")]
    return lines[-1].strip() if lines else type(error).__name__


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or damaged: {_last_line(error)}") from error


def _with_model_and_args(contents: Any, path: Path) -> dict[str, Any]:
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, expected a dict with the key 'model'")
    if "model" not in contents and not _is_state_dict(contents):
        raise CheckpointError(f"{path} has no key 'model'; its keys are {sorted(map(str, contents))[:10]}")
    checkpoint = dict(contents) if "model" in contents else {"model": dict(contents)}
    if not _is_state_dict(checkpoint["model"]):
        raise CheckpointError(f"{path}: 'model' must be a non-empty dict of name to tensor")
    args = checkpoint.get("args") or {}
    checkpoint["args"] = dict(args) if isinstance(args, Mapping) else dict(vars(args))
    return checkpoint


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())


def save_checkpoint(contents: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``contents`` with ``torch.save``, all or nothing.

    It goes to ``.<name>.tmp`` beside ``path``, to the disk, and only then takes the place of ``path``: at every moment
    ``path`` is the old checkpoint or the new one. One process may write to a path at a time.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the old file is as it was, no other is left.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    partial = target.with_name(f".{target.name}.tmp")
    try:
        with partial.open("wb") as file:
            _save_torch(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written, what was there is kept: {error.strerror or error}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


class _KeepFirstError:
    """Stands between torch's zip writer and the file, because an exception inside the writer loses its cause."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, chunk: Any) -> int:
        size = memoryview(chunk).nbytes
        if self.error is None:
            try:
                self.file.write(chunk)
            except OSError as error:
                self.error = error
        return size

    def flush(self) -> None:
        """Flushing once at the end, by the caller, is enough."""


def _save_torch(contents: Mapping[str, Any], file: BinaryIO) -> None:
    writer = _KeepFirstError(file)
    torch.save(dict(contents), cast(Any, writer))
    if writer.error is not None:
        raise writer.error


class WithoutRandomWeights(TorchFunctionMode):
    """Layers that are made inside keep what their memory held: for models whose every weight is loaded next.

    To draw the 41 million random numbers of a DETR-R50 takes 0.4 s, half of what it takes from an import to the model.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# Methods of tensors, and those functions of torch.nn.init that a mode sees before the methods.
_DRAWING = ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_")


def prepare_output_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder ``path`` where it is missing and prove that it can be written.

    Raises:
        CheckpointError: it cannot be created, or a file cannot be written in it.
    """
    folder = Path(path)
    probe = folder / ".write_test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"the output folder {folder} cannot be written: {error.strerror or error}") from error
    return folder


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], *, reset_class_head: bool = False) -> list[str]:
    """Load ``state_dict`` into ``model``, whole or not at all.

    Args:
        model: receives the weights in place.
        state_dict: names and shapes as in ``model``; ``num_batches_tracked`` counters that the model lacks are ignored.
        reset_class_head: keep the model's own class head, of whatever size, in place of the file's.

    Returns:
        The keys left as ``model`` had them, [] without ``reset_class_head``.

    Raises:
        CheckpointError: a key is missing, unknown or of another shape; the message names the keys and both shapes.
    """
    own = model.state_dict()
    found = {key: value for key, value in state_dict.items() if key in own or not key.endswith("num_batches_tracked")}
    reset = [key for key in own if reset_class_head and _is_class_head(key)]
    found.update({key: own[key] for key in reset})
    _check_same_keys(own, found)
    _check_same_shapes(own, found)
    model.load_state_dict(found)
    return reset


def _is_class_head(key: str) -> bool:
    return any(part in ("class_embed", "linear_class") for part in key.split("."))  # the second is DetrDemo's


def _check_same_keys(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for problem, keys in (("lacks", own.keys() - found.keys()), ("has unknown", found.keys() - own.keys())):
        if keys:
            shown = ", ".join(sorted(keys)[:5]) + (", ..." if len(keys) > 5 else "")
            raise CheckpointError(f"the checkpoint {problem} {len(keys)} of the model's {len(own)} keys: {shown}")


def _check_same_shapes(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for key, value in own.items():
        if value.shape != found[key].shape:
            advice = "; --reset-class-head (reset_class_head=True) starts this head anew" if _is_class_head(key) else ""
            expected, came = list(value.shape), list(found[key].shape)
            raise CheckpointError(f"{key}: the model expects shape {expected}, the checkpoint has {came}{advice}")


def random_state() -> dict[str, Any]:
    """The state of torch's, NumPy's, Python's and the current CUDA device's generators, in types that load safely."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "python": random.getstate(),
        # The current device's alone: asking the others would open a context on each, for every process.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what ``random_state`` returned; a CUDA state is left out where there is no GPU."""
    name, keys, position, has_gauss, cached = state["numpy"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
