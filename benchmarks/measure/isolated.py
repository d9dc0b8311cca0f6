"""Run a measurement in a process of its own: fresh memory, fresh caches, and a crash that harms nobody else."""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

__all__ = ["Progress", "isolated", "part"]

Progress = Callable[[int, int], None]


def part(progress: Progress, index: int, count: int) -> Progress:
    """The progress of one of several equal parts.

    >>> part(print, 1, 3)(2, 5)
    7 15
    """
    return lambda done, total: progress(index * total + done, count * total)


def isolated(function: Callable[..., Any], *args: Any, threads: int, progress: Progress, first: int = 0) -> Any:
    """Call ``function(*args, progress)`` in a new process that is pinned to so many cores.

    Args:
        function: importable by name; what it takes and returns travels by pickle.
        threads: CPU threads, and cores.
        progress: called here with what the function reports there.
        first: how many of this process's cores to leave to others.

    Raises:
        RuntimeError: the function raised, with its traceback, or the process died.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, (first, first + threads), function, args))
    process.start()
    there.close()
    try:
        while True:
            kind, value = here.recv()
            if kind == "progress":
                progress(*value)
            elif kind == "result":
                return value
            else:
                raise RuntimeError(f"{function.__module__}.{function.__qualname__} failed:\n{value}")
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__qualname__}: its process died with exit code {process.exitcode}") from None
    finally:
        process.join(timeout=60)
        if process.is_alive():
            process.kill()


def _work(answer: Connection, cores: tuple[int, int], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, own[slice(*cores)] or own)  # all, where there are too few
    torch.set_num_threads(cores[1] - cores[0])
    warnings.simplefilter("ignore")  # deprecations inside transformers; ours are errors in the tests
    try:
        answer.send(("result", function(*args, lambda done, total: answer.send(("progress", (done, total))))))
    except BaseException:
        answer.send(("error", traceback.format_exc()))
