"""Fine-tunings of one base on one task, side by side: an adapter, so many steps, what is right then."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .data import Splits
from .descent import scheduled
from .lanes import Descent, Lanes
from .methods import adapted, rate_ratio
from .recipe import Recipe
from .suite import Learner
from .table import Table

__all__ = ["Outcome", "Run", "begun", "fine_tune", "percent_right"]

_BATCH = 32
"""Examples that are evaluated at once."""


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        method: a name of `methods.METHODS` or `methods.VARIANTS`, or ``full``.
        rank: of its adapter; 0 where there is none.
        task: its name.
        rate: the highest learning rate; of A and B the geometric mean, where they have two.
        seed: of the adapter's weights and of the order of examples, which is the same for all methods.
    """

    method: str
    rank: int
    task: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        parameters: of the adapter, or of the base if that was trained.
        validation: what is right on that split, in percent.
        test: what is right on that split, in percent.
        seconds: of a CPU core; its part, where several ran side by side.
    """

    parameters: int
    validation: float
    test: float
    seconds: float = field(default=0.0, compare=False)


def fine_tune(learner: Learner, base: nn.Module, splits: Splits, runs: Sequence[Run], recipe: Recipe) -> list[Outcome]:
    """Train on the split ``train``, evaluate on the others.

    Args:
        learner: of the suite.
        base: what it loads; stays as it is.
        splits: the examples of the task.
        runs: of one method, rank and task; with learning rates and seeds of their own.
        recipe: what all runs share.
    """
    started = time.process_time()
    lanes, rates, parameters = begun(learner, base, runs, recipe)
    tables = {split: learner.table(runs[0].task, examples).to(recipe.device) for split, examples in splits.items()}
    descent = Descent(lanes, rates)
    orders = zip(*(_batches(len(tables["train"]), recipe.batch, run.seed) for run in runs), strict=True)
    torch.manual_seed(runs[0].seed)
    for index, order in enumerate(itertools.islice(orders, recipe.steps)):
        losses = lanes.each(learner.loss, *tables["train"].rows(torch.stack(order)), same=False)
        descent.step(losses, scheduled(index, recipe.steps))
    lanes.model.eval()
    answers = partial(lanes.each, learner.right, same=True)
    validation, test = (percent_right(answers, tables[split]).tolist() for split in ("validation", "test"))
    seconds = (time.process_time() - started) / len(runs)
    return [Outcome(parameters, *right, seconds) for right in zip(validation, test, strict=True)]


def begun(
    learner: Learner, base: nn.Module, runs: Sequence[Run], recipe: Recipe
) -> tuple[Lanes, dict[str, Tensor], int]:
    """What runs begin with: the model in training mode, learning rates by weight and lane, the adapter's parameters.

    Args:
        learner: of the suite.
        base: what it loads.
        runs: as for `fine_tune`.
        recipe: what all runs share.
    """
    first = runs[0]
    starts = []
    for run in runs:
        torch.manual_seed(run.seed)
        body = adapted(copy.deepcopy(base), run.method, run.rank, learner.task_type)
        model = learner.model(body, run.task)
        starts.append({name: weight for name, weight in model.named_parameters() if weight.requires_grad})
    factors = _factors(body, rate_ratio(first.method))
    lanes = Lanes(model.to(recipe.device).train(), starts)
    own = torch.tensor([run.rate for run in runs], dtype=torch.float64)
    head = torch.full_like(own, learner.head_rate)
    rates = {
        name: own * factors[id(weight)] if id(weight) in factors else head
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    return lanes, rates, sum(weight.numel() for weight in body.parameters() if weight.requires_grad)


def _factors(body: nn.Module, ratio: float) -> Mapping[int, float]:
    """The body's weights learn at the run's rate times these; what the suite put onto it is not among them."""
    from flora_fx.adapters import parameter_groups

    groups = parameter_groups(body, lr=1 / math.sqrt(ratio), ratio=ratio)
    return {id(weight): group["lr"] for group in groups for weight in group["params"]}


@torch.no_grad()
def percent_right(answers: Callable[..., Tensor], table: Table) -> Tensor:
    """How many of the examples are answered right, in percent [...]; a number, or one for each lane.

    Args:
        answers: of rows, whether each is answered right [..., examples].
        table: at least one example. The longest are evaluated together.
    """
    right = [answers(*table.rows(index)).double().sum(-1) for index in table.lengths.argsort().split(_BATCH)]
    return 100 * torch.stack(right).sum(0) / len(table)


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """The indices of all examples in a random order, again and again, in batches of one size [size]."""
    drawn = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=drawn)])
        yield left[:size]
        left = left[size:]
