"""Weights that are mapped from a file: what was read of them is given back, and read again by whoever needs it.

safetensors are mapped, not read: a page of a weight takes memory once somebody looks at it, and from then on. Who goes
through all weights once, one after the other, would hold them all in the end.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

__all__ = ["give_back", "giving_back"]

_DONTNEED = 4  # of Linux's madvise
_MAPS, _SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ +(/\S.*)?$")

_given: list[tuple[int, int]] = []


@contextmanager
def giving_back(model: nn.Module) -> Iterator[None]:
    """Let `give_back` do its work meanwhile, for the weights that a model has in mapped files.

    For who loaded the model and lets nobody write to it: what was written to such a weight is no file's, and such a
    mapping is left alone. On Linux; elsewhere nothing happens.

    >>> with giving_back(nn.Linear(2, 3)):
    ...     give_back()
    """
    before = list(_given)
    _given.extend(_mappings(model))
    try:
        yield
    finally:
        _given[:] = before


def give_back() -> None:
    """Give back the memory of mapped weights, which stay what they are, and what was freed and is kept in hand."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # of glibc
        libc.malloc_trim(0)
    if not _given:
        return
    wanted, madvise = set(_given), libc.madvise
    for start, end in _unwritten():
        if (start, end) in wanted:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _mappings(model: nn.Module) -> list[tuple[int, int]]:
    """The ranges of memory that are mapped files with weights of a model in them."""
    if not sys.platform.startswith("linux"):
        return []
    places = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    found = []
    for line in _MAPS.read_text().splitlines():
        match = _RANGE.match(line)
        if match is None or match[4] is None:
            continue
        start, end = int(match[1], 16), int(match[2], 16)
        if any(start <= place < end for place in places):
            found.append((start, end))
    return found


def _unwritten() -> Iterator[tuple[int, int]]:
    """The mappings of this process that hold nothing but what their files hold."""
    current: tuple[int, int] | None = None
    for line in _SMAPS.read_text().splitlines():
        if (match := _RANGE.match(line)) is not None:
            current = int(match[1], 16), int(match[2], 16)
        elif line.startswith("Anonymous:") and line.split()[1] == "0" and current is not None:
            yield current
