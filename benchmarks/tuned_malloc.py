"""A model in a process of its own whose malloc keeps freed memory, to be timed beside those of this process."""

from __future__ import annotations

import multiprocessing
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from benchmarks.inference_process import TUNED
from benchmarks.runtimes import WAYS, model_of
from benchmarks.shapes import InferenceShape

NAME = ", tuned malloc"


class TunedProcess:
    """Runs a model of ``benchmarks.runtimes.WAYS`` there and gives what it finds.

    Args:
        way: its name.
        shape: the model and the images' size.
        images: what every call is given, sent once.
    """

    def __init__(self, way: str, shape: InferenceShape, images: Tensor) -> None:
        # A fresh interpreter, because malloc reads its settings when a program starts.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        threads = torch.get_num_threads()
        process = context.Process(target=_serve, args=(theirs, way, shape, images.numpy(), threads), daemon=True)
        with _environment(TUNED):
            process.start()
        weakref.finalize(self, process.terminate)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and boxes of the images that it was made with."""
        self._connection.send(None)
        logits, boxes = self._connection.recv()
        return torch.from_numpy(logits), torch.from_numpy(boxes)


def _serve(connection: Connection, way: str, shape: InferenceShape, images: object, threads: int) -> None:
    torch.set_num_threads(threads)
    pixels = torch.from_numpy(images)
    with torch.inference_mode():
        run = WAYS[way](model_of(shape), pixels)
        while True:
            connection.recv()
            connection.send([found.numpy() for found in run(pixels)])


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
