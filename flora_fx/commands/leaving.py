"""The end of the process, once a command has ended."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["leaving"]


@contextmanager
def leaving() -> Iterator[None]:
    """End the process where the block asks for it, at once.

    Python would first take apart all that was imported and made, piece by piece: behind an export two seconds. What is
    registered with `atexit` is called, and what was printed is written; where another thread runs or that cannot be
    written, Python ends the process itself.
    """
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, int) and threading.active_count() == 1:
            atexit._run_exitfuncs()
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            except OSError:
                raise end from None
            os._exit(end.code)
        raise
