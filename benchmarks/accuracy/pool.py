"""Fine-tunings side by side: processes with one thread each, lanes in each process, a journal of what they finish."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from ..measure.isolated import Progress
from .data import Splits
from .journal import Journal
from .onednn import use_onednn
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
        lanes: runs of one method and rank that a process does at once.
    """

    def __init__(self, workers: int, learner: Learner, tasks: Mapping[str, Splits], recipe: Recipe, lanes: int) -> None:
        self._lanes = lanes
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
        missing = [run for run in wanted if run not in journal]
        running = {self._processes.submit(_work, group): group for group in _groups(missing, self._lanes)}
        done = len(wanted) - len(missing)
        progress(done, len(wanted))
        for future in as_completed(running):
            for run, outcome in zip(running[future], future.result(), strict=True):
                journal.add(run, outcome)
                done += 1
            progress(done, len(wanted))


def _groups(runs: Sequence[Run], lanes: int) -> Iterator[list[Run]]:
    """Runs that one process does at once."""
    alike: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.method, run.rank), []).append(run)
    for group in alike.values():
        for start in range(0, len(group), lanes):
            yield group[start : start + lanes]


_here: dict[str, Any] = {}
"""What a worker holds between its runs."""


def _begin(learner: Learner, tasks: Mapping[str, Splits], recipe: Recipe) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # deprecations inside transformers; ours are errors in the tests
    _here.update(products=use_onednn(), learner=learner, base=learner.load(), tasks=tasks, recipe=recipe)


def _end_with_parent() -> None:
    """A parent that is killed tells its workers nothing: they would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _work(runs: list[Run]) -> list[Outcome]:
    return fine_tune(_here["learner"], _here["base"], _here["tasks"], runs, _here["recipe"])
