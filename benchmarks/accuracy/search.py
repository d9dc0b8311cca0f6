"""A search for better variants by the rule of `registered`: chosen on one half of the tasks, reported on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flora_fx.progress import Bar

from .accuracy import measure
from .intervals import Tried, bootstrap, mean, settled
from .methods import FULL, LORA, family
from .plan import Plan
from .registered import PLAIN, REGISTERED, rule
from .summary import TARGET, cells_of

__all__ = ["best", "judged", "reached", "reported", "search"]

Result = Mapping[str, Any]


def search(plan: Plan, journal: Path, *, progress: Bar = lambda label: lambda done, total: None) -> dict[str, Any]:
    """Choose on one half of a suite's tasks, report on the other.

    Args:
        plan: suite, budgets, learning rates, seeds; tuning seeds are those of the first half. Its methods are those
            that are registered, its tasks the suite's.
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
    shared = replace(plan, until=0.0, seeds=plan.tuning_seeds or plan.seeds)
    choice = measure(replace(shared, methods=REGISTERED, tasks=plan.suite.choice), journal, progress=progress)
    chosen = {budget: best(choice, budget) for budget in plan.budgets}
    wanted = {budget: {*PLAIN, *(method for method, _ in winners.values())} for budget, winners in chosen.items()}
    entered = replace(
        plan,
        methods=tuple(method for method in REGISTERED if any(method in methods for methods in wanted.values())),
        only=frozenset((budget, method) for budget, methods in wanted.items() for method in methods),
        tasks=plan.suite.report,
        tuning_seeds=0,
    )
    report = measure(entered, journal, progress=progress) | {"verdicts": []}
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
        means = reached(choice, budget, method)
        if means and mean(means) > found.get(family(method), ("", -1.0))[1]:
            found[family(method)] = (method, mean(means))
    return found


def reached(choice: Result, budget: int, method: str) -> list[float]:
    """What is right on the validation splits at a method's best rates, by task; none if it took no part."""
    return [Tried(cell["validation"]).best for cell in cells_of(choice, budget, method)]


def _verdict(report: Result, budget: int, winners: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    names = {of: method for of, (method, _) in winners.items()}
    ours, theirs, plain = (reported(report, budget, method) for method in (names["FFBA"], names[LORA], LORA))
    return {
        "budget": budget,
        "chosen": names,
        "validation": {of: validation for of, (_, validation) in winners.items()},
        **judged(ours, theirs, plain),
    }


def judged(ours: Sequence[Tried], theirs: Sequence[Tried], plain: Sequence[Tried]) -> dict[str, Any]:
    """What is published of the chosen FFBA, and whether it is the target.

    Args:
        ours: the chosen FFBA, by task.
        theirs: the chosen LoRA.
        plain: LoRA without a variation.
    """
    difference = asdict(bootstrap(ours, theirs))
    return {
        "difference": difference,
        "over_tasks": asdict(bootstrap(ours, theirs, over_tasks=True)),
        "to_plain": asdict(bootstrap(ours, plain)),
        "target": TARGET,
        "reached": difference["mean"] >= TARGET and difference["low"] > 0,
    }


def reported(report: Result, budget: int, method: str) -> list[Tried]:
    """What a method gets right at a budget, by task: at all rates if tuning ran all seeds, at the chosen one else."""
    return [
        Tried(cell["validation"], cell["tests"]) if "tests" in cell else settled(cell["test"])
        for cell in cells_of(report, budget, method)
    ]
