"""A search for better variants by the rule of `registered`: chosen on one half of the tasks, reported on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flora_fx.progress import Bar

from .accuracy import measure
from .methods import FULL, LORA, family
from .plan import Plan
from .registered import PLAIN, REGISTERED, rule
from .summary import TARGET, bootstrap

__all__ = ["best", "differences", "judged", "search"]

Result = Mapping[str, Any]


def search(plan: Plan, journal: Path, *, progress: Bar = lambda label: lambda done, total: None) -> dict[str, Any]:
    """Choose on one half of a suite's tasks, report on the other.

    Args:
        plan: suite, budgets, learning rates, seeds. Its methods are those that are registered, its tasks the suite's.
        journal: as for `accuracy.measure`.
        progress: makes a progress callback from a label.

    Returns:
        ``rule`` and ``registered``; ``choice`` and ``report``: what `accuracy.measure` returns of each half; and
        ``verdicts``, one per budget: ``chosen`` by family, their mean on the ``validation`` splits of the first half,
        and on the second half ``difference``, of the chosen FFBA to the chosen LoRA, with ``over_tasks``, the interval
        when tasks are drawn anew as well as seeds, and ``to_plain``, the difference to plain LoRA.

    Raises:
        ValueError: every task of a half is left out, or as for `accuracy.measure`.
    """
    shared = replace(plan, until=0.0, seeds=plan.tuning_seeds)
    choice = measure(replace(shared, methods=REGISTERED, tasks=plan.suite.choice), journal, progress=progress)
    chosen = {budget: best(choice, budget) for budget in plan.budgets}
    named = [method for winners in chosen.values() for method, _ in winners.values()]
    wanted = replace(plan, methods=tuple(dict.fromkeys((*PLAIN, *named))), tasks=plan.suite.report)
    report = measure(wanted, journal, progress=progress) | {"verdicts": []}
    return {
        "rule": rule(),
        "registered": list(REGISTERED),
        "choice": choice | {"verdicts": []},
        "report": report,
        "verdicts": [_verdict(report, budget, winners) for budget, winners in chosen.items()],
    }


def best(choice: Result, budget: int) -> dict[str, tuple[str, float]]:
    """Of each family the method with the best mean over the tasks' validation splits, and that mean.

    Args:
        choice: what `accuracy.measure` returned.
        budget: a rank of LoRA.
    """
    found: dict[str, tuple[str, float]] = {}
    for method in dict.fromkeys(cell["method"] for cell in choice["cells"] if cell["method"] != FULL):
        cells = [cell for cell in choice["cells"] if (cell["budget"], cell["method"]) == (budget, method)]
        means = [max(map(_mean, cell["validation"])) for cell in cells]
        if means and _mean(means) > found.get(family(method), ("", -1.0))[1]:
            found[family(method)] = (method, _mean(means))
    return found


def _verdict(report: Result, budget: int, winners: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    (ours, _), (theirs, _) = winners["FFBA"], winners[LORA]
    return {
        "budget": budget,
        "chosen": {of: method for of, (method, _) in winners.items()},
        "validation": {of: mean for of, (_, mean) in winners.items()},
        **judged(differences(report, budget, ours, theirs), differences(report, budget, ours, LORA)),
    }


def judged(chosen: Sequence[Sequence[float]], plain: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What is published of the chosen FFBA, and whether it is the target.

    Args:
        chosen: its differences to the chosen LoRA, by task and seed.
        plain: those to plain LoRA.
    """
    difference = asdict(bootstrap(chosen))
    return {
        "difference": difference,
        "over_tasks": asdict(bootstrap(chosen, over_tasks=True)),
        "to_plain": asdict(bootstrap(plain)),
        "target": TARGET,
        "reached": difference["mean"] >= TARGET and difference["low"] > 0,
    }


def differences(report: Result, budget: int, one: str, other: str) -> list[list[float]]:
    """Between two methods at a budget on the test splits, by task and seed."""
    tests = [
        {cell["task"]: cell["test"] for cell in report["cells"] if (cell["budget"], cell["method"]) == (budget, method)}
        for method in (one, other)
    ]
    return [[a - b for a, b in zip(mine, tests[1][task], strict=True)] for task, mine in tests[0].items()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
