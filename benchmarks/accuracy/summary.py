"""From single runs to what is published: the chosen learning rates, means, paired differences and their intervals.

All intervals are 95% bootstrap intervals over seeds: for a mean over tasks, seeds are drawn anew within each task, and
tasks stay as they are. So they say how far another draw of seeds would move a figure, not another choice of tasks,
test examples or learning rates. Where few seeds choose the learning rate, that can move a difference by more than the
interval: two searches by one rule differed by 4.6 points where their intervals were ±1. Five seeds are few: such
intervals are somewhat too narrow.

Where every seed was run at every rate there is a second interval, in which each draw of seeds chooses its rates anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flora_fx.measuring.method import interval

from .methods import FULL, LORA, Contestant, family

__all__ = ["TARGET", "Interval", "Pair", "Tried", "bootstrap", "chosen", "compared", "over_rates", "summary", "widest"]

TARGET = 2.1
"""Points above LoRA that FFBA's best variant is to reach, as a mean over tasks."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Tried:
    """What tuning found.

    Attributes:
        validation: what is right on the validation split, by rate and seed.
        chosen: the index of the best rate.
        test: what is right on the test split, by rate and seed.
    """

    validation: Sequence[Sequence[float]]
    chosen: int
    test: Sequence[Sequence[float]] = ()

    @property
    def at_end(self) -> bool:
        """Whether the best rate is the first or the last: a wider grid may have a better one."""
        return self.chosen in (0, len(self.validation) - 1)

    @property
    def best(self) -> float:
        """Its validation accuracy, a mean over seeds."""
        return _mean(self.validation[self.chosen])


Pair = tuple[Contestant, str]


def chosen(validation: Sequence[Sequence[float]]) -> int:
    """The index of the rate with the best mean; of equals the first, which is the smallest.

    >>> chosen([[10, 20], [40, 40], [50, 30]])
    1
    """
    means = [_mean(values) for values in validation]
    return means.index(max(means))


def bootstrap(values: Sequence[Sequence[float]], *, over_tasks: bool = False, draws: int = 10_000) -> Interval:
    """The mean over tasks of means over seeds; seeds are drawn anew within each task.

    Args:
        values: by task and seed, of which tasks may have different numbers; for a paired difference, of the pairs.
        over_tasks: whether tasks are drawn anew as well: how far another choice of tasks would move the mean.
        draws: that the interval comes from.

    >>> bootstrap([[1.0, 1.0], [3.0, 3.0]])
    Interval(mean=2.0, low=2.0, high=2.0)
    """
    seeds, tasks = (torch.Generator().manual_seed(number) for number in range(2))
    tables = [torch.tensor(row, dtype=torch.float64) for row in values]
    drawn = [row[torch.randint(len(row), (draws, len(row)), generator=seeds)].mean(1) for row in tables]
    means = torch.stack(drawn, 1)
    if over_tasks:
        means = means.gather(1, torch.randint(len(tables), (draws, len(tables)), generator=tasks))
    return Interval(torch.stack([row.mean() for row in tables]).mean().item(), *interval(means.mean(1)))


def over_rates(pairs: Sequence[tuple[Tried, Tried]], draws: int = 10_000) -> Interval:
    """The mean difference over tasks; each draw of seeds within a task chooses both learning rates by its validation.

    Args:
        pairs: by task, what is compared and what it is compared to; each with as many seeds, run at all rates.
        draws: that the interval comes from.
    """
    generator = torch.Generator().manual_seed(0)
    drawn, means = [], []
    for one, other in pairs:
        seeds = len(one.test[0])
        index = torch.randint(seeds, (draws, seeds), generator=generator)
        drawn.append(_tuned(one, index) - _tuned(other, index))
        means.append(_mean(one.test[one.chosen]) - _mean(other.test[other.chosen]))
    return Interval(_mean(means), *interval(torch.stack(drawn, 1).mean(1)))


def _tuned(tried: Tried, index: torch.Tensor) -> torch.Tensor:
    """What is right on the test split at the rate that some seeds choose [draws]; the seeds are [draws, seeds]."""
    validation, test = (
        torch.tensor(values, dtype=torch.float64)[:, index].mean(-1) for values in (tried.validation, tried.test)
    )
    return test.gather(0, validation.argmax(0, keepdim=True))[0]


def compared(
    one: Contestant, other: Contestant, tasks: Sequence[str], tests: Mapping[Pair, Sequence[float]]
) -> Interval:
    """The mean difference between two contestants over tasks, by pairs of a task and a seed.

    Args:
        one: what is compared.
        other: what it is compared to.
        tasks: their names.
        tests: what is right on the test split, by seed.
    """
    return bootstrap([_minus(tests[one, task], tests[other, task]) for task in tasks])


def widest(contestants: Sequence[Contestant], tasks: Sequence[str], tests: Mapping[Pair, Sequence[float]]) -> float:
    """Half the widest interval of a difference between an adapter and LoRA at the same budget, in points.

    The rule by which seeds are added looks at how wide intervals are, not at where they lie: it favours nobody.

    Args:
        contestants: those that take part.
        tasks: their names.
        tests: what is right on the test split, by seed.
    """
    rival = {one.budget: one for one in contestants if one.method == LORA}
    found = [compared(one, rival[one.budget], tasks, tests) for one in contestants if one.method not in (LORA, FULL)]
    return max(((interval.high - interval.low) / 2 for interval in found), default=0.0)


def summary(
    contestants: Sequence[Contestant],
    tasks: Sequence[str],
    rates: Sequence[float],
    tried: Mapping[Pair, Tried],
    tests: Mapping[Pair, Sequence[float]],
) -> dict[str, Any]:
    """Everything that is published of the runs.

    Args:
        contestants: methods at budgets, also those that could not take part.
        tasks: their names.
        rates: learning rates.
        tried: what tuning found, by contestant and task.
        tests: what is right on the test split at the chosen rate, by seed.

    Returns:
        ``contestants``: method, budget, rank, parameters, or why not; ``cells``, one per contestant and task: the
        chosen ``rate``, whether it is ``at_end`` of the grid, ``validation`` by rate and seed, ``test`` by seed, its
        ``mean`` and ``spread`` (standard deviation over seeds) and the paired ``difference`` to LoRA at the same
        budget; ``means``, one per contestant: ``test`` and ``difference``, over tasks, and where tuning ran every seed
        ``over_rates``, the difference with rates chosen anew; ``grid``, one per contestant and rate: ``validation``
        with that rate for all tasks, and its ``difference`` to LoRA's with the same rate; ``verdicts``, one per budget:
        FFBA's ``best`` variant by validation, its ``difference`` on the test split, and whether it is the target.
    """
    competing = [contestant for contestant in contestants if not contestant.unavailable]
    rival = {contestant.budget: contestant for contestant in competing if contestant.method == LORA}
    cells, means, grid = [], [], []
    for one in competing:
        lora = rival.get(one.budget, one)
        another = lora is not one
        named = {"budget": one.budget, "method": one.method}
        differences = [_minus(tests[one, task], tests[lora, task]) for task in tasks]
        for task, difference in zip(tasks, differences, strict=True):
            found = tried[one, task]
            cell = named | {"task": task, "rate": rates[found.chosen], "at_end": found.at_end}
            cell |= {"validation": found.validation, "test": tests[one, task]}
            cell |= {"mean": _mean(tests[one, task]), "spread": _spread(tests[one, task])}
            cells.append(cell | _compared(another, [difference]))
        mean = named | {"test": asdict(bootstrap([tests[one, task] for task in tasks]))}
        means.append(mean | _compared(another, differences))
        if another and all(
            _tuned_whole(tried[method, task], tests[method, task]) for method in (one, lora) for task in tasks
        ):
            means[-1]["over_rates"] = asdict(over_rates([(tried[one, task], tried[lora, task]) for task in tasks]))
        for index, rate in enumerate(rates):
            own, other = ([tried[method, task].validation[index] for task in tasks] for method in (one, lora))
            pairs = [_minus(*pair) for pair in zip(own, other, strict=True)]
            entry = named | {"rate": rate, "validation": _mean([_mean(values) for values in own])}
            grid.append(entry | _compared(another, pairs))
    verdicts = [_verdict(budget, competing, tasks, tried, means) for budget in rival]
    return {
        "contestants": [asdict(contestant) for contestant in contestants],
        "cells": cells,
        "means": means,
        "grid": grid,
        "verdicts": [verdict for verdict in verdicts if verdict],
    }


def _verdict(
    budget: int,
    competing: Sequence[Contestant],
    tasks: Sequence[str],
    tried: Mapping[Pair, Tried],
    means: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """FFBA's best variant at a budget, chosen as learning rates are: by validation, so that the test stays a test."""
    variants = [one for one in competing if one.budget == budget and family(one.method) == "FFBA"]
    if not variants:
        return {}
    best = max(variants, key=lambda one: _mean([tried[one, task].best for task in tasks]))
    [mean] = [mean for mean in means if (mean["budget"], mean["method"]) == (budget, best.method)]
    difference = mean["difference"]
    return {
        "budget": budget,
        "best": best.method,
        "difference": difference,
        "target": TARGET,
        "reached": difference["mean"] >= TARGET,
    }


def _tuned_whole(tried: Tried, tests: Sequence[float]) -> bool:
    """Whether tuning ran every seed, and more than one."""
    return bool(tried.test) and len(tried.test[0]) == len(tests) > 1


def _compared(another: bool, differences: Sequence[Sequence[float]]) -> dict[str, Any]:
    return {"difference": asdict(bootstrap(differences))} if another else {}


def _minus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [mine - theirs for mine, theirs in zip(one, other, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).std(correction=min(1, len(values) - 1)).item()
