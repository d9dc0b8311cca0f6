"""How sure a mean is: 95% bootstrap intervals over seeds, and over the learning rates that they choose.

For a mean over tasks seeds are drawn anew within each task, and tasks stay as they are. So an interval says how far
another draw of seeds would move a figure, not another choice of tasks or test examples. Where every seed was run at
every learning rate, each draw of seeds chooses its rate anew, by their validation; where few seeds have chosen it, that
is not in the interval, and can move a difference by more: two searches by one rule differed by 4.6 points where their
intervals were ±1. Five seeds are few: such intervals are somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_fx.measuring.method import interval

__all__ = ["Interval", "Tried", "bootstrap", "chosen", "mean", "settled"]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Tried:
    """What a contestant gets right on a task, in percent.

    Attributes:
        validation: on that split, by learning rate and seed.
        test: on that split, likewise.
    """

    validation: Sequence[Sequence[float]]
    test: Sequence[Sequence[float]] = ()

    @property
    def chosen(self) -> int:
        """The index of the best rate."""
        return chosen(self.validation)

    @property
    def at_end(self) -> bool:
        """Whether the best rate is the first or the last: a wider grid may have a better one."""
        return self.chosen in (0, len(self.validation) - 1)

    @property
    def best(self) -> float:
        """Its validation accuracy, a mean over seeds."""
        return mean(self.validation[self.chosen])

    @property
    def reported(self) -> Sequence[float]:
        """What is right on the test split at the best rate, by seed."""
        return self.test[self.chosen]


def chosen(validation: Sequence[Sequence[float]]) -> int:
    """The index of the rate with the best mean; of equals the first, which is the smallest.

    >>> chosen([[10, 20], [40, 40], [50, 30]])
    1
    """
    means = [mean(values) for values in validation]
    return means.index(max(means))


def settled(values: Sequence[float]) -> Tried:
    """What is right at the one rate that is looked at, by seed: none is left to choose, whatever validation says.

    >>> settled([50.0, 60.0]).chosen
    0
    """
    return Tried([values], [values])


def bootstrap(
    ours: Sequence[Tried], theirs: Sequence[Tried] = (), *, over_tasks: bool = False, draws: int = 10_000
) -> Interval:
    """A mean over tasks of means over seeds; seeds are drawn anew within each task, and choose the rate.

    Args:
        ours: by task, of which tasks may have different numbers of seeds.
        theirs: what is taken from it, in pairs of a task and a seed; empty for the mean itself.
        over_tasks: whether tasks are drawn anew as well: how far another choice of tasks would move the mean.
        draws: that the interval comes from.

    >>> bootstrap([settled([1.0, 1.0]), settled([3.0, 3.0])])
    Interval(mean=2.0, low=2.0, high=2.0)
    >>> bootstrap([settled([1.0, 5.0])], [settled([0.0, 4.0])])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    seeds, tasks = (torch.Generator().manual_seed(number) for number in range(2))
    means, drawn = [], []
    for one, *others in zip(ours, theirs, strict=True) if theirs else zip(ours, strict=True):
        count = len(one.test[0])
        index = torch.randint(count, (draws, count), generator=seeds)
        means.append(mean(one.reported) - sum(mean(other.reported) for other in others))
        drawn.append(_right(one, index) - sum(_right(other, index) for other in others))
    table = torch.stack(drawn, 1)
    if over_tasks:
        table = table.gather(1, torch.randint(len(drawn), table.shape, generator=tasks))
    return Interval(mean(means), *interval(table.mean(1)))


def _right(tried: Tried, index: Tensor) -> Tensor:
    """What is right on the test split at the rate that some seeds choose [draws]; the seeds are [draws, seeds]."""
    validation, test = (
        torch.tensor(values, dtype=torch.float64)[:, index].mean(-1) for values in (tried.validation, tried.test)
    )
    return test.gather(0, validation.argmax(0, keepdim=True))[0]


def mean(values: Sequence[float]) -> float:
    """Of numbers of which there are some."""
    return sum(values) / len(values)
