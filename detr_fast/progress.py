"""How a training run shows itself: a bar on a terminal, a line an epoch elsewhere, nothing on other processes."""

from __future__ import annotations

import sys
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from detr_fast.distributed import is_main
from detr_fast.fit import EpochReport, StepReport


def peak_memory() -> int:
    """The most memory in bytes so far: of the GPU where it is used, else of this process; 0 where it is not known."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB on Linux


class TrainProgress:
    """Shows a run of ``epochs`` epochs while entered; only the main process prints."""

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        self.epochs = epochs
        self.console = console or Console(quiet=not is_main())
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal and not self.console.quiet
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not live)
        self.task = self.bar.add_task("starting", total=None, status="")

    def __enter__(self) -> TrainProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def step(self, report: StepReport) -> None:
        """Move the bar: loss, images per second, memory, and the time left of the whole run."""
        rate = report.images / max(report.seconds, 1e-9)
        self.bar.update(
            self.task,
            description=f"epoch {report.epoch + 1}/{self.epochs}",
            total=self.epochs * report.steps,
            completed=report.epoch * report.steps + report.step,
            status=f"loss {report.loss:.3f}  {rate:.1f} img/s  {peak_memory() / 2**30:.1f} GiB",
        )

    def epoch(self, report: EpochReport, stats: dict[str, float]) -> None:
        """Print the line of a finished epoch."""
        rate = report.images / max(report.seconds, 1e-9)
        score = "".join(f"  {name} {stats[name]:.3f}" for name in ("AP", "AP50", "PQ") if name in stats)
        self.note(
            f"epoch {report.epoch + 1}/{self.epochs}  loss {report.losses['loss']:.3f}{score}  {rate:.1f} img/s  "
            f"{report.seconds:.0f} s  {peak_memory() / 2**30:.1f} GiB"
        )

    def note(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class DemoDisplay:
    """A bar on a terminal, filled by time; and lines."""

    def __init__(self, seconds: float, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[status]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
        self.bar.disable = not self.console.is_terminal
        self.task = self.bar.add_task("training", total=seconds, status="")

    def __enter__(self) -> DemoDisplay:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def move(self, seconds: float, status: str) -> None:
        """Set the bar to the time since the start."""
        self.bar.update(self.task, completed=seconds, status=status)

    def note(self, text: str) -> None:
        """Print lines."""
        self.console.print(text, markup=False, soft_wrap=True)
