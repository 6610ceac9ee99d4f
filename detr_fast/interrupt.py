"""Ctrl-C and SIGTERM as requests: the loop finishes its update, saves, and ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from detr_fast.fit import Interrupted


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is only noted; calling the object returns its number, or 0.

    A second one is answered in the usual way, for those who cannot wait for the update to end.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.immediate = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> int:
        return self.signum

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises ``Interrupted`` where it strikes: for work that may be left half done."""
        if self.signum:
            raise Interrupted(self.signum, at_once=True)
        self.immediate = True
        try:
            yield
        finally:
            self.immediate = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.immediate:
            raise Interrupted(signum, at_once=True)
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
