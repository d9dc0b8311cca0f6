"""Accuracy of LoRA, of FFBA adapters and of full fine-tuning at equal budgets of trainable parameters.

Every method gets the largest rank that the budget buys, the same training and the same learning rates to choose from:
per task, the one that does best on the validation split over the tuning seeds, which may be all. What is reported is
the test split at that rate, over all seeds (those that tuning has run are not run again). Seeds differ in the adapter's
first weights and in the order of the examples.

Where a suite has candidates for tasks, LoRA at the smallest budget is tuned first, and those that it solves or does not
learn are left out: no other method is asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flora_fx.progress import Bar

from .intervals import Tried, settled
from .journal import Journal
from .methods import LORA, Contestant, contestants
from .plan import Plan
from .pool import Pool
from .run import Outcome, Run
from .suite import Prepared
from .summary import Pair, summary, widest

__all__ = ["measure"]

Found = Mapping[Pair, Sequence[Outcome]]


def measure(plan: Plan, journal: Path, *, progress: Bar = lambda label: lambda done, total: None) -> dict[str, Any]:
    """Tune every method at every budget on every task, then run it.

    Args:
        plan: what is compared.
        journal: a JSONL file; runs that it has are not run again. What the suite makes is kept beside it.
        progress: makes a progress callback from a label.

    Returns:
        ``{"settings", "tasks", "contestants", "cells", "means", "grid", "verdicts"}``; see `summary.summary`. ``tasks``
        has each candidate with its baselines, where there are any, and why it was left out, or an empty string.

    Raises:
        CheckpointNotFoundError: there is no such model.
        AdapterError: the model cannot be read, has no tokenizer, or does not take an example.
        MissingExtraError: what the suite is made of is not installed.
        ValueError: every task is left out; the message says why.
        RuntimeError: a method trained other parameters than were counted for it.
    """
    prepared = plan.suite.prepare(plan, journal.parent, progress)
    entered = [one for one in contestants(prepared.base, plan.methods, plan.budgets) if plan.enters(one)]
    competing = [contestant for contestant in entered if not contestant.unavailable]
    book = Journal(journal, prepared.learner, prepared.base, prepared.tasks, plan.recipe, prepared.below)
    with Pool(plan.processes, prepared.learner, prepared.tasks, plan.recipe, plan.side_by_side) as pool:
        told = _screened(plan, prepared, entered, pool, book, progress)
        tasks = [task for task, why in told.items() if not why]
        pairs = list(itertools.product(competing, tasks))
        seeds = plan.seeds
        while True:
            tuning = plan.tuning_seeds or seeds
            tuned = list(_tuning(plan, pairs, tuning))
            pool.finish(tuned, book, progress("tune"))
            tried = {pair: _tried(plan, pair, book, tuning) for pair in pairs}
            chosen = {
                pair: [_run(pair, plan.rates[tried[pair].chosen], seed) for seed in range(seeds)] for pair in pairs
            }
            pool.finish(itertools.chain(*chosen.values()), book, progress(f"train, {seeds} seeds"))
            found = {pair: [book[run] for run in runs] for pair, runs in chosen.items()}
            final = tried
            if tuning < seeds:
                final = {pair: settled([one.test for one in outcomes]) for pair, outcomes in found.items()}
            if not plan.until or seeds >= plan.most_seeds or widest(competing, tasks, final) <= plan.until:
                break
            seeds = min(plan.most_seeds, seeds + max(1, seeds // 2))
    _check_budgets(found)
    runs = {*tuned, *itertools.chain(*chosen.values())}
    settings = _settings(plan, prepared, tasks) | {
        "seeds": seeds,
        "tuning_seeds": tuning,
        "trainings": len(runs),
        "cpu_seconds": round(sum(book[run].seconds for run in runs)),
    }
    described = [_described(prepared, task, why) for task, why in told.items()]
    return {"settings": settings, "tasks": described, **summary(entered, tasks, plan.rates, tried, final)}


def _run(pair: Pair, rate: float, seed: int) -> Run:
    contestant, task = pair
    return Run(contestant.method, contestant.rank, task, rate, seed)


def _tuning(plan: Plan, pairs: Sequence[Pair], seeds: int) -> Iterator[Run]:
    for pair, rate, seed in itertools.product(pairs, plan.rates, range(seeds)):
        yield _run(pair, rate, seed)


def _tried(plan: Plan, pair: Pair, book: Journal, seeds: int) -> Tried:
    outcomes = [[book[_run(pair, rate, seed)] for seed in range(seeds)] for rate in plan.rates]
    validation, test = ([[getattr(one, split) for one in row] for row in outcomes] for split in ("validation", "test"))
    return Tried(validation, test)


def _screened(
    plan: Plan, prepared: Prepared, entered: Sequence[Contestant], pool: Pool, book: Journal, progress: Bar
) -> dict[str, str]:
    """Why each task is left out; empty where it is compared."""
    told = dict.fromkeys(prepared.tasks, "")
    if plan.suite.admitted is None or not plan.screened:
        return told
    lora = next(one for one in entered if (one.method, one.budget) == (LORA, min(plan.budgets)))
    pairs, seeds = [(lora, task) for task in told], plan.tuning_seeds or plan.seeds
    pool.finish(_tuning(plan, pairs, seeds), book, progress("LoRA alone"))
    for pair in pairs:
        frozen = prepared.baselines[pair[1]].validation
        told[pair[1]] = plan.suite.admitted(frozen, _tried(plan, pair, book, seeds).best)
    if all(told.values()):
        raise ValueError(f"no task is left: {'; '.join(f'{task}: {why}' for task, why in told.items())}")
    return told


def _described(prepared: Prepared, task: str, why: str) -> dict[str, Any]:
    baseline = prepared.baselines.get(task)
    return {"task": task, "left_out": why} | ({} if baseline is None else asdict(baseline))


def _check_budgets(found: Found) -> None:
    for (contestant, task), outcomes in found.items():
        for outcome in outcomes:
            if outcome.parameters != contestant.parameters:
                raise RuntimeError(
                    f"{contestant.method} trained {outcome.parameters} parameters on {task!r}, "
                    f"not the {contestant.parameters} that were counted for it"
                )


def _settings(plan: Plan, prepared: Prepared, tasks: Sequence[str]) -> dict[str, Any]:
    sizes = {name: {split: len(examples) for split, examples in prepared.tasks[name].items()} for name in tasks}
    return {
        "suite": plan.suite.name,
        "measured": plan.suite.measured,
        "model": prepared.model,
        "parameters": sum(weight.numel() for weight in prepared.base.parameters()),
        "recipe": asdict(plan.recipe),
        "rates": list(plan.rates),
        "until": plan.until,
        "tasks": sizes,
        "text": dict(prepared.text),
    }
