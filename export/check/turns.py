"""Functions that run in turns: each as far as it goes, then the next one."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["Turns"]

T = TypeVar("T")


class _Ended(BaseException):
    """Another function failed; not for those who catch every `Exception`."""


class _Turn:
    """A function, in a thread that waits for its turn."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.given = threading.Semaphore(0)
        self.over = False
        self.result: Any = None


class Turns:
    """Lets functions run in turns. There is always one that runs; the others wait where they passed on.

    Attributes:
        current: the number of the one that runs.

    >>> turns, said = Turns(), []
    >>> def count(name):
    ...     for number in range(2):
    ...         said.append(f"{name}{number}")
    ...         turns.pass_on()
    ...     return name
    >>> turns.run([lambda: count("a"), lambda: count("b")]), said
    (['a', 'b'], ['a0', 'b0', 'a1', 'b1'])
    """

    def __init__(self) -> None:
        self._turns: list[_Turn] = []
        self.current = 0
        self._error: BaseException | None = None
        self._done = threading.Semaphore(0)

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """What each returns. They run in threads, with the gradient mode and the context variables of this one.

        Raises:
            BaseException: what the first that failed has raised; the others end where they wait.
        """
        turns = self._turns = [_Turn(function) for function in functions]
        self.current, self._error = 0, None
        grad = torch.is_grad_enabled()
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._follow, turn, grad)) for turn in turns
        ]
        for thread in threads:
            thread.start()
        try:
            if turns:
                turns[0].given.release()
                self._done.acquire()
        except BaseException as error:  # this thread's own, such as Ctrl-C
            self._error = error
            raise
        finally:
            for turn, thread in zip(turns, threads, strict=True):
                turn.given.release()
                thread.join()
            self._turns = []
        if self._error is not None:
            raise self._error
        return [turn.result for turn in turns]

    def pass_on(self) -> None:
        """Wait until all others have passed on, or returned. Called by one of the functions; no one else waits."""
        if not self._turns:
            return
        turn = self._turns[self.current]
        self._next()
        self._wait(turn)

    def _follow(self, turn: _Turn, grad: bool) -> None:
        try:
            with torch.set_grad_enabled(grad):
                self._wait(turn)
                turn.result = turn.function()
        except _Ended:
            return
        except BaseException as error:
            self._error = error
            self._done.release()
            return
        turn.over = True
        self._next()

    def _wait(self, turn: _Turn) -> None:
        turn.given.acquire()
        if self._error is not None:
            raise _Ended

    def _next(self) -> None:
        count = len(self._turns)
        for index in range(self.current + 1, self.current + 1 + count):
            if not self._turns[index % count].over:
                self.current = index % count
                self._turns[self.current].given.release()
                return
        self._done.release()
