"""Work beside the model: what comes before and after it runs in threads where there are cores for them, in order."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], pool: Executor | None, count: int) -> Iterator[Result]:
    """``map(work, items)`` in the threads of ``pool``, in the order of ``items``.

    At most ``count`` items are in work or wait to be taken, so that memory is bounded. An error of ``work`` is raised
    where its result would come. Work that has begun when the caller stops is finished; ``pool`` waits for it. Without
    a pool it is ``map``.
    """
    if pool is None:
        yield from map(work, items)
        return
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) >= count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def ahead_in_order(items: Iterable[Item], pool: Executor | None, count: int) -> Iterator[Item]:
    """The same items, made by the one thread of ``pool`` that keeps ``count`` of them ready; without it, by the caller.

    For what must be made in order, such as the frames of a video.
    """
    iterator, end = iter(items), object()
    for item in ahead(lambda _: next(iterator, end), repeat(None), pool, count):
        if item is end:
            return
        yield item  # type: ignore[misc]  # it is not ``end``


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextmanager
def helpers(device: torch.device) -> Iterator[Executor | None]:
    """Threads for the work beside a model on ``device``; None where there is no core for them.

    A model on the CPU has a thread for every core (torch.get_num_threads), and one thread more slows it by more than
    that thread does: a small model's 25 ms became 62 beside one that decodes, 454 beside one that draws, on two cores.
    """
    count = spare_cores(device)
    if count == 0:
        yield None
        return
    with ThreadPoolExecutor(count) as pool:
        yield pool


@contextmanager
def one_thread(beside: Executor | None) -> Iterator[Executor | None]:
    """One more thread, for what must go in order; None where ``beside`` says that there is no core for it."""
    if beside is None:
        yield None
        return
    with ThreadPoolExecutor(1) as pool:
        yield pool


def spare_cores(device: torch.device) -> int:
    """Cores of this process, up to 8, that the model does not use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores - torch.get_num_threads() if device.type == "cpu" else cores))


@dataclass
class Speed:
    """Where the time of a run went.

    Attributes:
        images: how many were done.
        seconds: of the whole run.
        shares: seconds that the run waited for each of its parts; the longest bounds it.
    """

    images: int = 0
    seconds: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    _start: float = field(default_factory=time.perf_counter)

    def timed(self, part: str, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time until each one comes belongs to ``part``, less what its own parts took."""
        iterator = iter(items)
        while True:
            start, inner = time.perf_counter(), sum(self.shares.values())
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                nested = sum(self.shares.values()) - inner
                self.shares[part] = self.shares.get(part, 0.0) + time.perf_counter() - start - nested
            yield item

    def stop(self, images: int) -> None:
        """The run is over."""
        self.images, self.seconds = images, time.perf_counter() - self._start

    def render(self) -> str:
        """Say it in a line."""
        if not self.images or not self.shares:
            return "no image was done"
        rate = f"{self.images / self.seconds:.3g} images per second"
        bound, share = max(self.shares.items(), key=lambda entry: entry[1])
        return f"{self.seconds:.1f} s, {rate}, bounded by {bound} ({share / self.seconds:.0%} of the time)"
