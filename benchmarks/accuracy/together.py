"""What searches of several suites say together: means over the tasks of all their second halves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .intervals import Tried, bootstrap
from .methods import LORA
from .registered import PLAIN
from .search import judged, reported

__all__ = ["together"]

Result = Mapping[str, Any]


def together(searches: Mapping[str, Result]) -> dict[str, Any]:
    """One verdict per budget that all have.

    Args:
        searches: what `search.search` returned, by the name of its record.

    Returns:
        ``searches``: per record its suite, its tasks, its seeds, and how many of them tuning looked at; ``verdicts``,
        per budget: ``chosen`` by record and family; as in `search.search`, of the tasks of all, ``difference``,
        ``over_tasks`` and ``to_plain``; ``plain``, the difference of `shared` to LoRA without a variation; and whether
        the target is reached.

    Raises:
        ValueError: fewer than two, one that is no search, or no budget that all have.
    """
    if len(searches) < 2:
        raise ValueError(f"two searches or more go together; there is {', '.join(searches) or 'none'}")
    for name, one in searches.items():
        if "choice" not in one:
            raise ValueError(f"{name} is no search: python -m benchmarks accuracy --search --name {name}")
    chosen = {
        name: {verdict["budget"]: verdict["chosen"] for verdict in one["verdicts"]} for name, one in searches.items()
    }
    first, *others = chosen.values()
    budgets = [budget for budget in first if all(budget in other for other in others)]
    if not budgets:
        raise ValueError(f"{', '.join(searches)} have no budget in common")
    described = {
        name: {
            "suite": one["report"]["settings"]["suite"],
            "tasks": list(one["report"]["settings"]["tasks"]),
            "seeds": one["report"]["settings"]["seeds"],
            "tuning_seeds": one["report"]["settings"]["tuning_seeds"],
        }
        for name, one in searches.items()
    }
    return {
        "searches": described,
        "verdicts": [
            _verdict(budget, searches, {name: found[budget] for name, found in chosen.items()}) for budget in budgets
        ],
    }


def _verdict(budget: int, searches: Mapping[str, Result], chosen: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    def of(methods: Mapping[str, str]) -> list[Tried]:
        return [tried for name, one in searches.items() for tried in reported(one["report"], budget, methods[name])]

    plain, shared = (of(dict.fromkeys(chosen, method)) for method in PLAIN)
    ours, theirs = (of({name: found[family] for name, found in chosen.items()}) for family in ("FFBA", LORA))
    return {
        "budget": budget,
        "chosen": chosen,
        **judged(ours, theirs, plain),
        "plain": asdict(bootstrap(shared, plain)),
    }
