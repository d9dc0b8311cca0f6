"""Calls from many threads, run in the first of them and in one more.

With CUDA graphs ONNX Runtime (1.31) keeps handles, workspaces and captured graphs for every thread that ever ran: a
server with a thread per request would capture anew in each, and never let go of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["OneThread"]


class OneThread:
    """Runs what it is given: in the thread that came first, or else in one of its own, and waits for it.

    >>> OneThread()(lambda: print("here"))
    here
    """

    def __init__(self) -> None:
        self._first = threading.local()  # not the number of a thread, which the next one may get
        self._lock = threading.Lock()
        self._taken = False
        self._others = ThreadPoolExecutor(1, "flora_fx")  # begins its thread when it is first used

    def __call__(self, call: Callable[[], object]) -> None:
        """Raises what the call raises."""
        with self._lock:
            if not self._taken:
                self._taken = self._first.here = True
        if hasattr(self._first, "here"):
            call()
        else:
            self._others.submit(call).result()
