"""Folders that all processes of a run share: the first that needs one makes it, and the others find it."""

from __future__ import annotations

import fcntl
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["made_once"]

Told = TypeVar("Told")


def made_once(place: Path, make: Callable[[Path], Told]) -> Told:
    """Make a folder, unless a process has made it; one that comes meanwhile waits.

    Args:
        place: the folder; it is not there, but the one that it is in may be.
        make: makes it; what it returns can be pickled.

    Returns:
        what ``make`` returned, here or there.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    told = place.with_name(f"{place.name}.pickle")
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not told.exists():
            told.write_bytes(pickle.dumps(make(place)))
    found: Told = pickle.loads(told.read_bytes())
    return found
