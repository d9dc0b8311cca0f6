"""Progress bars for long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flora_fx.errors import require

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Bar", "bars"]

Bar = Callable[[str], Callable[[int, int], None]]
"""Starts a progress bar with a label; what it returns is called with the steps done and in all."""


@contextmanager
def bars(console: Console | None) -> Iterator[Bar]:
    """Progress bars on the console, one below the other; without a console they count into the void."""
    if console is None:
        yield lambda label: lambda done, total: None
        return
    rich = require("rich.progress", "cli")
    columns = (
        rich.TextColumn("{task.description:<22}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
    )
    with rich.Progress(*columns, console=console) as progress:

        def bar(label: str) -> Callable[[int, int], None]:
            task = progress.add_task(label, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bar
