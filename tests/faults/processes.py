"""Work in a forked process, which may be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from tests.patience import LIMIT_S

__all__ = ["Forked", "die_before_line"]


class Forked:
    """A copy of this process that does some work and ends.

    Args:
        work: gets a function that tells this process a word.
    """

    def __init__(self, work: Callable[[Callable[[str], None]], None]) -> None:
        self._words, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setpgrp()  # so that it gets no signal but ours
                work(lambda word: (os.write(write, f"{word}\n".encode()), None)[1])
                code = 0
            except KeyboardInterrupt:
                code = 130
            except BaseException as error:
                os.write(write, f"{type(error).__name__}: {' '.join(str(error).split())}\n".encode())
                traceback.print_exc()
            finally:
                os._exit(code)  # nothing of this process's own, such as pytest's end, may happen in it
        os.close(write)
        self.said: list[str] = []
        self._rest = ""

    def wait_for(self, word: str, seconds: float = LIMIT_S) -> bool:
        """Whether it says a word, before it ends."""
        os.set_blocking(self._words, False)
        end = time.monotonic() + seconds
        while word not in self.said:
            try:
                read = os.read(self._words, 4096).decode()
            except BlockingIOError:
                assert time.monotonic() < end, f"not heard of {word!r} in {seconds} s"
                time.sleep(1e-3)
                continue
            if not read:
                return False
            *whole, self._rest = (self._rest + read).split("\n")
            self.said += whole
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def end(self) -> int:
        """Wait until it has ended; its exit code, or the negative number of the signal that killed it."""
        self.wait_for("a word that is never said")
        _, status = os.waitpid(self.pid, 0)
        os.close(self._words)
        return os.waitstatus_to_exitcode(status)


def die_before_line(number: int, file: str) -> None:
    """Kill this process (SIGKILL) before the line with a number, of those that it executes in a file from now on."""
    left = [number]

    def local(frame: object, event: str, _: object) -> object:
        if event == "line":
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGKILL)
        return local

    sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename == file else None)  # type: ignore[return-value]
