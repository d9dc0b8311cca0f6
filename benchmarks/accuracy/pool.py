"""Fine-tunings side by side: processes with one thread each, lanes in each process, a journal of what they finish."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from statistics import fmean
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
        self._sizes = {task: _tokens(splits) for task, splits in tasks.items()}
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
        running = {self._processes.submit(_work, group): group for group in self._groups(missing)}
        done = len(wanted) - len(missing)
        progress(done, len(wanted))
        for future in as_completed(running):
            for run, outcome in zip(running[future], future.result(), strict=True):
                journal.add(run, outcome)
                done += 1
            progress(done, len(wanted))

    def _groups(self, runs: Sequence[Run]) -> Iterator[list[Run]]:
        """Runs that one process does at once: of one method and rank, on tasks with examples of about one length.

        A lane's batch is as long as the longest of its group.
        """
        alike: dict[tuple[str, int], list[Run]] = {}
        for run in sorted(runs, key=lambda run: self._sizes[run.task]):
            alike.setdefault((run.method, run.rank), []).append(run)
        for group in alike.values():
            for start in range(0, len(group), self._lanes):
                yield group[start : start + self._lanes]


def _tokens(splits: Splits) -> float:
    """Of an example, in the mean."""
    return fmean(len(example.prompt) + len(example.answer) for examples in splits.values() for example in examples)


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
