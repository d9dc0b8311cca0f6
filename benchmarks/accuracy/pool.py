"""Fine-tunings side by side: a pool of processes with one thread each, and a journal of what they finish."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from ..measure.isolated import Progress
from .data import Splits
from .journal import Journal
from .recipe import Recipe
from .run import Outcome, Run, fine_tune
from .suite import Learner

__all__ = ["Pool"]


class Pool:
    """Processes that fine-tune one base; a context, which ends them.

    Args:
        workers: how many.
        learner: of the suite.
        tasks: their examples.
        recipe: what all runs share.
    """

    def __init__(self, workers: int, learner: Learner, tasks: Mapping[str, Splits], recipe: Recipe) -> None:
        self._processes = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(learner, tasks, recipe),
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._processes.shutdown(cancel_futures=True)

    def finish(self, runs: Iterable[Run], journal: Journal, progress: Progress) -> None:
        """Do the runs that the journal lacks.

        Args:
            runs: some may be the same.
            journal: gets each as it finishes.
            progress: called with the runs done, those of the journal among them, and in all.
        """
        wanted = list(dict.fromkeys(runs))
        running = {self._processes.submit(_work, run): run for run in wanted if run not in journal}
        found = len(wanted) - len(running)
        progress(found, len(wanted))
        for done, future in enumerate(as_completed(running), start=1):
            journal.add(running[future], future.result())
            progress(found + done, len(wanted))


_here: dict[str, Any] = {}
"""What a worker holds between its runs."""


def _begin(learner: Learner, tasks: Mapping[str, Splits], recipe: Recipe) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # deprecations inside transformers; ours are errors in the tests
    _here.update(learner=learner, base=learner.load(), tasks=tasks, recipe=recipe)


def _end_with_parent() -> None:
    """A parent that is killed tells its workers nothing: they would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _work(run: Run) -> Outcome:
    return fine_tune(_here["learner"], _here["base"], _here["tasks"][run.task], run, _here["recipe"])
