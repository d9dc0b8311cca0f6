"""The stages of a command, on stderr: a line with seconds for each that ended, and in a terminal a bar below."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from flora_fx.errors import require

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

__all__ = ["Stages", "columns", "staged_work", "uncollected"]


class Stages:
    """One stage after the other.

    Args:
        progress: a ``rich.progress.Progress``, which shows nothing where stderr is no terminal.
        count: how many stages there will be.

    Attributes:
        seconds: that each ended stage took.
        peaks: the most memory that the process has had by the end of each, in bytes; empty on Windows.
    """

    def __init__(self, progress: Progress, count: int) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._progress = progress
        self._count = count
        self._task = progress.add_task("", total=count)
        self._name = ""
        self._since = 0.0

    def begin(self, name: str) -> None:
        """End the stage that runs, if any, and begin another."""
        self.end()
        self._name, self._since = name, time.perf_counter()
        self._progress.reset(self._task, description=name, total=self._count, completed=len(self.seconds))

    def end(self) -> None:
        """End the stage that runs, if any."""
        if self._name:
            seconds = time.perf_counter() - self._since
            self.seconds[self._name] = seconds
            if sys.platform != "win32":
                self.peaks[self._name] = _peak()
            self._progress.console.print(f"{self._name:<10}{seconds:>8.1f} s", highlight=False)
            self._name = ""


def _peak() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the search for garbage that is a ring: what it finds is not worth a fifth of an export's time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # among the old ones: who ends now waits for no search through all of them
        if was:
            gc.enable()


@contextmanager
def staged_work(count: int) -> Iterator[Stages]:
    """Stages that end with the block; where it fails, the one that failed ends without its line.

    Args:
        count: how many there will be.
    """
    console = require("rich.console", "cli").Console(stderr=True)
    rich = require("rich.progress", "cli")
    progress = rich.Progress(*columns(), console=console, transient=True, disable=not console.is_terminal)
    with progress if console.is_terminal else nullcontext():  # rich 14.0 ends one that shows nothing with an empty line
        stages = Stages(progress, count)
        yield stages
        stages.end()


def columns() -> tuple[ProgressColumn, ...]:
    """What a terminal shows: the stage that runs, how many are done, and how long this one takes so far."""
    rich = require("rich.progress", "cli")
    return (
        rich.SpinnerColumn(),
        rich.TextColumn("{task.description:<10}"),
        rich.BarColumn(bar_width=20),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
    )
