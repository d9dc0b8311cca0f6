"""Accuracy of LoRA, of FFBA adapters and of full fine-tuning at equal budgets of trainable parameters.

Every method gets the largest rank that the budget buys, the same training and the same learning rates to choose from:
per task, the one with the best exact match on the validation split over the tuning seeds. What is reported is the test
split at that rate, over all seeds (those that tuning has run are not run again). Seeds differ in the adapter's first
weights and in the order of the examples.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora_fx.checkpoint import load_tokenizer
from flora_fx.errors import AdapterError
from flora_fx.progress import Bar

from . import data as accuracy_data
from . import tasks as accuracy_tasks
from .data import Row, Splits
from .journal import Journal
from .methods import FULL, LORA, METHODS, Contestant, contestants
from .model import Pretraining, pretrained
from .pool import Pool, load_base
from .run import Outcome, Recipe, Run
from .summary import Tried, chosen, summary

__all__ = ["Plan", "measure"]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        methods: names of `accuracy_methods.METHODS`, LoRA among them, and ``full``.
        tasks: names; empty for all that there are.
        budgets: ranks of LoRA; each is a budget, the parameters of that LoRA.
        rates: learning rates that each method is tuned over.
        seeds: runs at the chosen rate.
        tuning_seeds: how many of them tuning looks at.
        recipe: the training.
        pretraining: of the small model.
        model: directory or Hub id of a causal language model, instead of the small one.
        rows: what it is fine-tuned on, with `model` only.
        workers: processes; 0 for one per CPU core, and one on a GPU.

    Raises:
        ValueError: an unknown name, or a number that makes no sense.
    """

    methods: tuple[str, ...] = (FULL, *METHODS)
    tasks: tuple[str, ...] = ()
    budgets: tuple[int, ...] = (2, 8)
    rates: tuple[float, ...] = (1e-3, 2.4e-3, 5.5e-3, 1.3e-2, 3e-2)
    seeds: int = 5
    tuning_seeds: int = 2
    recipe: Recipe = field(default_factory=Recipe)
    pretraining: Pretraining = field(default_factory=Pretraining)
    model: str | None = None
    rows: tuple[Row, ...] = field(default=(), repr=False)
    workers: int = 0

    def __post_init__(self) -> None:
        if (self.model is None) != (not self.rows):
            raise ValueError("--model and --data go together: a model, and what it is fine-tuned on")
        known = {"method": (FULL, *METHODS), "task": self._known_tasks}
        for kind, names in (("method", self.methods), ("task", self.tasks)):
            for name in names:
                if name not in known[kind]:
                    raise ValueError(f"unknown {kind} {name!r}; it must be one of {'; '.join(known[kind])}")
        if self.recipe.device not in ("cpu", "cuda"):
            raise ValueError(f"unknown device {self.recipe.device!r}; it must be one of cpu, cuda")
        if self.recipe.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', and torch sees no CUDA device here")
        if LORA not in self.methods:
            raise ValueError(f"the methods must have {LORA} among them: differences are to it")
        for name in ("budgets", "rates"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"--{name} must be positive numbers, with commas")
        if not 1 <= self.tuning_seeds <= self.seeds:
            raise ValueError(f"--tuning-seeds is {self.tuning_seeds}; it must be 1 to {self.seeds}, the seeds")
        if min(self.recipe.steps, self.recipe.batch, self.pretraining.steps) < 1 or self.workers < 0:
            raise ValueError("--steps, --batch and --pretraining-steps must be at least 1, --workers at least 0")

    @property
    def _known_tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.task for row in self.rows)) or tuple(accuracy_tasks.UNSEEN)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Those that are run, in order."""
        return self.tasks or self._known_tasks

    @property
    def processes(self) -> int:
        """Those that fine-tune."""
        return self.workers or (1 if self.recipe.device == "cuda" else os.cpu_count() or 1)


def measure(plan: Plan, journal: Path, *, progress: Bar = lambda label: lambda done, total: None) -> dict[str, Any]:
    """Tune every method at every budget on every task, then run it.

    Args:
        plan: what is compared.
        journal: a JSONL file; runs that it has are not run again. The small model is kept beside it.
        progress: makes a progress callback from a label.

    Returns:
        ``{"settings", "contestants", "cells", "means", "grid", "verdicts"}``; see `accuracy_summary.summary`.

    Raises:
        CheckpointNotFoundError: there is no such model.
        AdapterError: the model cannot be read, has no tokenizer, or does not take an example.
        RuntimeError: a method trained other parameters than were counted for it.
    """
    model: str | Path = plan.model or pretrained(plan.pretraining, journal.parent, progress("pretrain"))
    base = load_base(model)
    tasks = _examples(plan, base)
    entered = contestants(base, plan.methods, plan.budgets)
    competing = [contestant for contestant in entered if not contestant.unavailable]
    pairs = list(itertools.product(competing, tasks))
    book = Journal(journal, base, tasks, plan.recipe)
    with Pool(plan.processes, model, tasks, plan.recipe) as pool:
        tuning = [
            _run(contestant, task, rate, seed)
            for contestant, task in pairs
            for rate in plan.rates
            for seed in range(plan.tuning_seeds)
        ]
        pool.finish(tuning, book, progress("tune"))
        tried = {}
        for contestant, task in pairs:
            validation = [
                [book[_run(contestant, task, rate, seed)].validation for seed in range(plan.tuning_seeds)]
                for rate in plan.rates
            ]
            tried[contestant, task] = Tried(validation, chosen(validation))
        final = {
            pair: [_run(*pair, plan.rates[tried[pair].chosen], seed) for seed in range(plan.seeds)] for pair in pairs
        }
        pool.finish(itertools.chain(*final.values()), book, progress("train"))
    found = {pair: [book[run] for run in runs] for pair, runs in final.items()}
    _check_budgets(found)
    tests = {pair: [outcome.test for outcome in outcomes] for pair, outcomes in found.items()}
    return {"settings": _settings(plan, base, tasks), **summary(entered, list(tasks), plan.rates, tried, tests)}


def _run(contestant: Contestant, task: str, rate: float, seed: int) -> Run:
    return Run(contestant.method, contestant.rank, task, rate, seed)


def _examples(plan: Plan, base: Any) -> dict[str, Splits]:
    if plan.model is None:
        return {name: accuracy_tasks.splits(name) for name in plan.task_names}
    tokenizer = load_tokenizer(plan.model)
    if tokenizer is None:
        raise AdapterError(f"{plan.model} has no tokenizer; save one beside the model")
    rows = (row for row in plan.rows if row.task in plan.task_names)
    encoded = accuracy_data.encode(rows, tokenizer, longest=base.config.max_position_embeddings)
    return {name: encoded[name] for name in plan.task_names}


def _check_budgets(found: Mapping[tuple[Contestant, str], Sequence[Outcome]]) -> None:
    for (contestant, task), outcomes in found.items():
        for outcome in outcomes:
            if outcome.parameters != contestant.parameters:
                raise RuntimeError(
                    f"{contestant.method} trained {outcome.parameters} parameters on {task!r}, "
                    f"not the {contestant.parameters} that were counted for it"
                )


def _settings(plan: Plan, base: nn.Module, tasks: Mapping[str, Splits]) -> dict[str, Any]:
    return {
        "model": plan.model or asdict(plan.pretraining) | {"tasks": list(accuracy_tasks.PRETRAINING)},
        "parameters": sum(weight.numel() for weight in base.parameters()),
        "recipe": asdict(plan.recipe),
        "rates": list(plan.rates),
        "seeds": plan.seeds,
        "tuning_seeds": plan.tuning_seeds,
        "tasks": {name: {split: len(examples) for split, examples in splits.items()} for name, splits in tasks.items()},
    }
