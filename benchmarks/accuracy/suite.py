"""What a suite is: a base, tasks with their examples, and how one learns the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from flora_fx.progress import Bar

from .data import Example, Splits
from .recipe import Recipe
from .table import Table

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["Baseline", "Learner", "Prepared", "Suite"]


class Learner(Protocol):
    """How a base learns a task; it is sent to the processes that train."""

    @property
    def task_type(self) -> str:
        """PEFT's word for what the base is."""

    @property
    def code(self) -> tuple[Path, ...]:
        """The files of code that decide how it learns."""

    @property
    def head_rate(self) -> float:
        """The highest learning rate of what `model` adds to an adapted base; of every method alike."""

    def load(self) -> nn.Module:
        """The base in float32, without a word on how far it is."""

    def model(self, adapted: nn.Module, task: str) -> nn.Module:
        """What is trained: the adapted base, with a head if the task needs one."""

    def table(self, task: str, examples: Sequence[Example]) -> Table:
        """Examples as tensors, on the CPU."""

    @property
    def loss(self) -> Callable[..., Tensor]:
        """Of the model and rows of a table; a scalar."""

    @property
    def right(self) -> Callable[..., Tensor]:
        """Which rows of a table the model answers right [examples]; of the model and those."""


@dataclass(frozen=True)
class Baseline:
    """What is right without fine-tuning, in percent.

    Attributes:
        labels: that there are.
        majority: of the test split, by guessing the label that the training split has most of.
        validation: of that split, by logistic regression on the frozen base's features.
        test: likewise.
    """

    labels: int
    majority: float
    validation: float
    test: float


@dataclass(frozen=True)
class Prepared:
    """A suite that is ready to be run.

    Attributes:
        learner: see there.
        base: what is fine-tuned.
        tasks: examples by task and split.
        model: what the base is, for the record.
        baselines: by task; empty where there are none.
        text: versions of what the examples were made of.
        below: a hash of what the base stands on; empty where it is all there is.
    """

    learner: Learner
    base: nn.Module
    tasks: Mapping[str, Splits]
    model: Any
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    text: Mapping[str, str] = field(default_factory=dict)
    below: str = ""


@dataclass(frozen=True)
class Suite:
    """Tasks, and what a run of them is by default.

    Attributes:
        name: of the suite.
        measured: what is counted, in words.
        tasks: their names. The first, third, … are those on which a search chooses, the others those on which what it
            chose is reported.
        prepare: loads or makes all that a plan needs, in a folder.
        admitted: why a task is left out, by percent right on the validation split of frozen features and of LoRA at the
            smallest budget; None where tasks were chosen beforehand.
        methods: names of them.
        budgets: ranks of LoRA.
        rates: learning rates.
        seeds: runs at the best rate.
        tuning_seeds: runs at each rate.
        recipe: the training.
    """

    name: str
    measured: str
    tasks: tuple[str, ...]
    prepare: Callable[[Plan, Path, Bar], Prepared] = field(repr=False)
    admitted: Callable[[float, float], str] | None = field(repr=False)
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: int
    tuning_seeds: int
    recipe: Recipe

    @property
    def choice(self) -> tuple[str, ...]:
        """The tasks on which a search chooses."""
        return self.tasks[::2]

    @property
    def report(self) -> tuple[str, ...]:
        """The tasks on which what it chose is reported."""
        return self.tasks[1::2]
