"""From single runs to what is published: the chosen learning rates, means, paired differences and their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from .intervals import Interval, Tried, bootstrap, mean, settled
from .methods import FULL, LORA, Contestant, family

__all__ = ["TARGET", "Pair", "cells_of", "compared", "summary", "widest"]

TARGET = 2.1
"""Points above LoRA that FFBA's best variant is to reach, as a mean over tasks."""

Pair = tuple[Contestant, str]


def compared(one: Contestant, other: Contestant, tasks: Sequence[str], final: Mapping[Pair, Tried]) -> Interval:
    """The mean difference between two contestants over tasks, by pairs of a task and a seed.

    Args:
        one: what is compared.
        other: what it is compared to.
        tasks: their names.
        final: as for `summary`.
    """
    return bootstrap([final[one, task] for task in tasks], [final[other, task] for task in tasks])


def widest(contestants: Sequence[Contestant], tasks: Sequence[str], final: Mapping[Pair, Tried]) -> float:
    """Half the widest interval of a difference between an adapter and LoRA at the same budget, in points.

    The rule by which seeds are added looks at how wide intervals are, not at where they lie: it favours nobody.

    Args:
        contestants: those that take part.
        tasks: their names.
        final: as for `summary`.
    """
    rival = {one.budget: one for one in contestants if one.method == LORA}
    found = [compared(one, rival[one.budget], tasks, final) for one in contestants if one.method not in (LORA, FULL)]
    return max(((interval.high - interval.low) / 2 for interval in found), default=0.0)


def summary(
    contestants: Sequence[Contestant],
    tasks: Sequence[str],
    rates: Sequence[float],
    tried: Mapping[Pair, Tried],
    final: Mapping[Pair, Tried],
) -> dict[str, Any]:
    """Everything that is published of the runs.

    Args:
        contestants: methods at budgets, also those that could not take part.
        tasks: their names.
        rates: learning rates.
        tried: what tuning found, by contestant and task.
        final: what all seeds found: at every rate if tuning ran them all, at the chosen one else.

    Returns:
        ``contestants``: method, budget, rank, parameters, or why not; ``cells``, one per contestant and task: the
        chosen ``rate``, whether it is ``at_end`` of the grid, ``validation`` by rate and seed, ``test`` by seed, its
        ``mean`` and ``spread`` (standard deviation over seeds), the paired ``difference`` to LoRA at the same budget,
        and where tuning ran every seed ``tests``, by rate and seed; ``means``, one per contestant: ``test`` and
        ``difference``, over tasks; ``grid``, one per contestant and rate: ``validation`` with that rate for all tasks,
        and its ``difference`` to LoRA's with the same rate; ``verdicts``, one per budget: FFBA's ``best`` variant by
        validation, its ``difference`` on the test split, and whether it is the target.
    """
    competing = [contestant for contestant in contestants if not contestant.unavailable]
    rival = {contestant.budget: contestant for contestant in competing if contestant.method == LORA}
    cells, means, grid = [], [], []
    for one in competing:
        lora = rival.get(one.budget, one)
        named = {"budget": one.budget, "method": one.method}
        ours, theirs = ([final[method, task] for task in tasks] for method in (one, lora))
        for task, own, other in zip(tasks, ours, theirs, strict=True):
            found = tried[one, task]
            cell = named | {"task": task, "rate": rates[found.chosen], "at_end": found.at_end}
            cell |= {"validation": found.validation, "test": own.reported}
            cell |= {"tests": own.test} if len(own.test) > 1 else {}
            cell |= {"mean": mean(own.reported), "spread": _spread(own.reported)}
            cells.append(cell | _compared(one, lora, [own], [other]))
        means.append(named | {"test": asdict(bootstrap(ours))} | _compared(one, lora, ours, theirs))
        for index, rate in enumerate(rates):
            ours, theirs = ([settled(tried[who, task].validation[index]) for task in tasks] for who in (one, lora))
            entry = named | {"rate": rate, "validation": mean([mean(own.reported) for own in ours])}
            grid.append(entry | _compared(one, lora, ours, theirs))
    verdicts = [_verdict(budget, competing, tasks, tried, means) for budget in rival]
    return {
        "contestants": [asdict(contestant) for contestant in contestants],
        "cells": cells,
        "means": means,
        "grid": grid,
        "verdicts": [verdict for verdict in verdicts if verdict],
    }


def cells_of(result: Mapping[str, Any], budget: int, method: str) -> list[Mapping[str, Any]]:
    """The cells of a method at a budget, in the order of the tasks; none if it took no part.

    Args:
        result: what `summary` returned.
        budget: a rank of LoRA; 0 where there is none.
        method: its name.
    """
    return [cell for cell in result["cells"] if (cell["budget"], cell["method"]) == (budget, method)]


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
    best = max(variants, key=lambda one: mean([tried[one, task].best for task in tasks]))
    [own] = [row for row in means if (row["budget"], row["method"]) == (budget, best.method)]
    difference = own["difference"]
    return {
        "budget": budget,
        "best": best.method,
        "difference": difference,
        "target": TARGET,
        "reached": difference["mean"] >= TARGET,
    }


def _compared(one: Contestant, lora: Contestant, ours: Sequence[Tried], theirs: Sequence[Tried]) -> dict[str, Any]:
    return {} if one is lora else {"difference": asdict(bootstrap(ours, theirs))}


def _spread(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).std(correction=min(1, len(values) - 1)).item()
