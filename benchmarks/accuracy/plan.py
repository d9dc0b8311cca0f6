"""What an accuracy suite compares."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from .data import Row
from .methods import FULL, LORA, METHODS, VARIANTS, Contestant
from .model import Pretraining
from .recipe import Recipe
from .sequence import SEQUENCE
from .suite import Suite

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        suite: tasks, and the model that they are for. The defaults below are those of `SEQUENCE`.
        methods: names of `methods.METHODS` or `methods.VARIANTS`, LoRA among them, and ``full``.
        tasks: names; empty for all that there are.
        screened: leave out tasks that LoRA solves or does not learn, where the suite has a rule for that.
        budgets: ranks of LoRA; each is a budget, the parameters of that LoRA.
        rates: learning rates that each method is tuned over.
        seeds: runs at the chosen rate.
        until: points; seeds are added until the 95% interval of each difference to LoRA, a mean over tasks, is no wider
            than plus or minus that. 0: none are added.
        most_seeds: that there may be then.
        tuning_seeds: how many of the seeds tuning looks at; 0 for all.
        only: budgets and methods that are entered; empty for every method at every budget.
        recipe: the training.
        pretraining: of the small model.
        model: directory or Hub id of a causal language model, instead of the small one.
        rows: what it is fine-tuned on, with `model` only.
        workers: processes; 0 for one per CPU core, and no more than 8 on a GPU.
        lanes: trainings of one method and rank that a process does at once; 0 for 8, and 128 on a GPU.

    Raises:
        ValueError: an unknown name, or a number that makes no sense.
    """

    suite: Suite = SEQUENCE
    methods: tuple[str, ...] = SEQUENCE.methods
    tasks: tuple[str, ...] = ()
    screened: bool = True
    budgets: tuple[int, ...] = SEQUENCE.budgets
    rates: tuple[float, ...] = SEQUENCE.rates
    seeds: int = SEQUENCE.seeds
    until: float = 0.0
    most_seeds: int = 60
    tuning_seeds: int = SEQUENCE.tuning_seeds
    only: frozenset[tuple[int, str]] = frozenset()
    recipe: Recipe = SEQUENCE.recipe
    pretraining: Pretraining = field(default_factory=Pretraining)
    model: str | None = None
    rows: tuple[Row, ...] = field(default=(), repr=False)
    workers: int = 0
    lanes: int = 0

    def __post_init__(self) -> None:
        if (self.model is None) != (not self.rows):
            raise ValueError("--model and --data go together: a model, and what it is fine-tuned on")
        if self.model is not None and self.suite is not SEQUENCE:
            raise ValueError(f"--model goes with --suite {SEQUENCE.name}: {self.suite.name} has a model of its own")
        known = {"method": (FULL, *METHODS, *VARIANTS), "task": self._known_tasks}
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
        if self.seeds < 1 or not 0 <= self.tuning_seeds <= self.seeds:
            raise ValueError(
                f"--tuning-seeds is {self.tuning_seeds}; it must be 1 to {self.seeds}, the seeds, or 0 for all of them"
            )
        if self.until < 0 or (self.until and self.most_seeds < self.seeds):
            raise ValueError(f"--until must be at least 0 points, --most-seeds at least {self.seeds}, the seeds")
        if min(self.recipe.steps, self.recipe.batch, self.pretraining.steps) < 1:
            raise ValueError("--steps, --batch and --pretraining-steps must be at least 1")
        if min(self.workers, self.lanes) < 0:
            raise ValueError("--workers and --lanes must be at least 0")

    @property
    def _known_tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.task for row in self.rows)) or self.suite.tasks

    @property
    def task_names(self) -> tuple[str, ...]:
        """Those that are run, in order."""
        return self.tasks or self._known_tasks

    def enters(self, one: Contestant) -> bool:
        """Whether a method takes part at a budget."""
        return not self.only or (one.budget, one.method) in self.only

    @property
    def processes(self) -> int:
        """Those that fine-tune."""
        cores = os.cpu_count() or 1
        return self.workers or (min(8, cores) if self._on_gpu else cores)

    @property
    def side_by_side(self) -> int:
        """Trainings that each of them does at once."""
        return self.lanes or (128 if self._on_gpu else 8)

    @property
    def _on_gpu(self) -> bool:
        return self.recipe.device == "cuda"
