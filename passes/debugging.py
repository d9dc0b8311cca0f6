"""For whoever debugs the passes: graphs written down between them, passes left out.

FLORA_FX_DUMP=folder           folder/0/00-given.txt, then a file for each pass that changed the graph; 1/ is the
                               next graph that is fused
FLORA_FX_LEAVE_OUT=rotary,…    the others run as if these had found nothing
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path

from torch.fx import Graph

from .context import Pass

__all__ = ["DUMP", "LEAVE_OUT", "Dump", "names_left_out", "open_dump"]

DUMP = "FLORA_FX_DUMP"
LEAVE_OUT = "FLORA_FX_LEAVE_OUT"


class Dump:
    """Writes a graph into a folder whenever it has changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = ""

    def write(self, position: int, name: str, graph: Graph) -> None:
        """Write the graph as code, unless it is as it was.

        Args:
            position: sorts the files.
            name: what was done last.
            graph: the graph now.
        """
        code = graph.python_code("self", verbose=True).src
        if code != self._last:
            (self._folder / f"{position:02d}-{name}.txt").write_text(code, encoding="utf-8")
        self._last = code


def open_dump() -> Dump | None:
    """A dump into a new folder, if the user wants one.

    Raises:
        ValueError: ``FLORA_FX_DUMP`` is not the name of a folder that can be written to.
    """
    if not (given := os.environ.get(DUMP)):
        return None
    parent = Path(given)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = next(folder for number in count() if not (folder := parent / str(number)).exists())
        folder.mkdir()
    except OSError as error:
        raise ValueError(f"{DUMP} is {given!r}, where no folder can be made: {error}; name another one") from error
    return Dump(folder)


def names_left_out(passes: Sequence[Pass]) -> Collection[str]:
    """The passes that the user wants to be left out.

    Raises:
        ValueError: ``FLORA_FX_LEAVE_OUT`` names none of the passes that can be.
    """
    names = {name.strip() for name in os.environ.get(LEAVE_OUT, "").split(",")} - {""}
    optional = [step.name for step in passes if step.optional]
    for name in sorted(names.difference(optional)):
        raise ValueError(f"{LEAVE_OUT} names {name!r}; only these passes can be left out: {', '.join(optional)}")
    return names
