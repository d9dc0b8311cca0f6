"""Fine-tunings of one base side by side: an adapter, so many steps, what is right then."""

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
from torch.nn.utils.rnn import pad_sequence

from .data import Splits
from .descent import Descent, scheduled
from .lanes import Lanes
from .methods import adapted, gained, rate_ratio
from .recipe import Recipe
from .suite import Learner
from .table import Table, joined

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


def fine_tune(
    learner: Learner, base: nn.Module, tasks: Mapping[str, Splits], runs: Sequence[Run], recipe: Recipe
) -> list[Outcome]:
    """Train on the split ``train``, evaluate on the others.

    Args:
        learner: of the suite.
        base: what it loads; stays as it is.
        tasks: their examples.
        runs: of one method and rank; with tasks, learning rates and seeds of their own.
        recipe: what all runs share.
    """
    started = time.process_time()
    lanes, rates, parameters = begun(learner, base, runs, recipe)
    table, own = _data(learner, tasks, runs, "train", recipe.device)
    descent = Descent(lanes.weights, rates)
    orders = zip(*(_batches(of, recipe.batch, run.seed) for run, of in zip(runs, own, strict=True)), strict=True)
    torch.manual_seed(runs[0].seed)
    for step, order in enumerate(itertools.islice(orders, recipe.steps)):
        losses = lanes.each(learner.loss, *table.rows(torch.stack(order)))
        descent.step(losses, scheduled(step, recipe.steps))
    lanes.model.eval()
    right = []
    for split in ("validation", "test"):
        table, own = _data(learner, tasks, runs, split, recipe.device)
        index = pad_sequence([of[table.lengths[of].argsort()] for of in own], batch_first=True, padding_value=-1)
        right.append(percent_right(partial(lanes.each, learner.right), table, index).tolist())
    seconds = (time.process_time() - started) / len(runs)
    return [Outcome(parameters, validation, test, seconds) for validation, test in zip(*right, strict=True)]


def _data(
    learner: Learner, tasks: Mapping[str, Splits], runs: Sequence[Run], split: str, device: str
) -> tuple[Table, list[Tensor]]:
    """One table for the tasks of some runs, and where in it the examples of each run are."""
    tables = {task: learner.table(task, tasks[task][split]) for task in dict.fromkeys(run.task for run in runs)}
    table = joined(list(tables.values())).to(device)
    places = dict(zip(tables, torch.arange(len(table)).split([len(one) for one in tables.values()]), strict=True))
    return table, [places[run.task] for run in runs]


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
    starts: dict[tuple[int, str], dict[str, Tensor]] = {}
    for method, rank, task, seed in ((run.method, run.rank, run.task, run.seed) for run in runs):
        if (seed, task) not in starts:
            torch.manual_seed(seed)
            body = adapted(copy.deepcopy(base), method, rank, learner.task_type)
            model = learner.model(body, task)
            starts[seed, task] = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    names = {id(weight): name for name, weight in model.named_parameters()}
    inside = dict(body.named_parameters())
    multiplied = [names[id(inside[name])] for name in gained(body, runs[0].method)]
    each = [starts[run.seed, run.task] for run in runs]
    lanes = Lanes(model.to(recipe.device).train(), each, multiplied)
    own = torch.tensor([run.rate for run in runs], dtype=torch.float64)
    rates = dict.fromkeys(lanes.weights, own)  # of gains
    for name in each[0]:
        rates[name] = torch.full_like(own, learner.head_rate)
    for weight, factor in _factors(body, rate_ratio(runs[0].method)):
        rates[names[id(weight)]] = factor * own
    count = sum(weight.numel() for weight in inside.values() if weight.requires_grad)
    return lanes, rates, count + len(multiplied)


def _factors(body: nn.Module, ratio: float) -> Iterator[tuple[nn.Parameter, float]]:
    """What a weight of the body learns at, to the run's rate."""
    from flora_fx.adapters import parameter_groups

    for group in parameter_groups(body, lr=1 / math.sqrt(ratio), ratio=ratio):
        yield from ((weight, group["lr"]) for weight in group["params"])


@torch.no_grad()
def percent_right(answers: Callable[..., Tensor], table: Table, index: Tensor) -> Tensor:
    """How many of some examples are answered right, in percent [...]; a number, or one for each lane.

    Args:
        answers: of rows, whether each is answered right [..., examples].
        table: that the examples are in.
        index: of the examples [..., examples]; -1 where there is none.
    """
    there = index >= 0
    right = torch.zeros(index.shape[:-1], dtype=torch.long)
    for start in range(0, index.shape[-1], _BATCH):
        few = slice(start, start + _BATCH)
        found = answers(*table.rows(index[..., few].clamp(min=0))).cpu()
        right += (found & there[..., few]).sum(-1)
    return 100 * right.double() / there.sum(-1)


def _batches(examples: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """All examples in a random order, again and again, in batches of one size [size]."""
    drawn = torch.Generator().manual_seed(seed)
    left = examples[:0]
    while True:
        while len(left) < size:
            left = torch.cat([left, examples[torch.randperm(len(examples), generator=drawn)]])
        yield left[:size]
        left = left[size:]
