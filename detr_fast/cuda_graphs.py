"""Capturing CUDA graphs that share their memory. **It has not run on a GPU yet.**"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class GraphPool:
    """Graphs in one piece of memory, of which only one may run at a time: that of the largest, not the sum of all."""

    def __init__(self) -> None:
        self._pool: Any = None

    def capture(self, run: Callable[[], Result], stream: torch.cuda.Stream | None = None) -> Callable[[], Result]:
        """A function that launches what ``run`` launches; it returns the same tensors each time.

        Args:
            run: has been called before, so that nothing is compiled, chosen or allocated for good in it any more.
            stream: to capture on; None takes one for it.
        """
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others, such as a loader's, go on allocating memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            results = run()
        self._pool = self._pool or graph.pool()

        def replay() -> Result:
            graph.replay()
            return results

        return replay
