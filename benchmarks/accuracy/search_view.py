"""A search's result for readers: what was chosen, what it is worth, and what else was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..show.sheet import Sheet
from . import view
from .intervals import mean
from .methods import LORA
from .search import reached

__all__ = ["draw", "setup", "sheets"]

Result = Mapping[str, Any]


def setup(result: Result) -> str:
    """What was done, in sentences for the page; a record may have a note on how it was made."""
    halves = f"First half: {view.setup(result['choice'])} Second half: {view.setup(result['report'])}"
    return " ".join(filter(None, (result["rule"], result.get("note"), halves)))


def sheets(result: Result) -> list[Sheet]:
    """The verdict; per budget what was tried on the first half; then the second half as any measurement."""
    return [
        _verdicts(result),
        *(_tried(result, verdict) for verdict in result["verdicts"]),
        *view.sheets(result["report"]),
    ]


def draw(result: Result, path: Path) -> Sequence[Path]:
    """The second half, as any measurement.

    Args:
        result: of `search.search`.
        path: without a suffix.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return view.draw(result["report"], path)


def _verdicts(result: Result) -> Sheet:
    body, notes = [], []
    for one in result["verdicts"]:
        chosen = one["chosen"]
        differences = [view.signed(one[name]) for name in ("difference", "over_tasks", "to_plain")]
        body.append([str(one["budget"]), chosen["FFBA"], chosen[LORA], *differences])
        found = "reached" if one["reached"] else "missed"
        target = f"the target of +{one['target']} points with the whole interval above 0"
        notes.append(f"Budget of a LoRA of rank {one['budget']}: {target} is {found}.")
    known = view.intervals(result["report"])
    notes.append(
        f"{known} In the middle one tasks are drawn, too. Nor do they know of another choice of variants, which few "
        "seeds make on the first half."
    )
    header = ["LoRA's rank", "FFBA chosen", "LoRA chosen", "− LoRA chosen", "with tasks drawn", f"− {LORA}"]
    return Sheet("What was chosen on the first half, on the test splits of the second", header, body, notes)


def _tried(result: Result, verdict: Mapping[str, Any]) -> Sheet:
    choice, budget = result["choice"], verdict["budget"]
    tasks = list(choice["settings"]["tasks"])
    body = []
    for method in result["registered"]:
        values = reached(choice, budget, method)
        if not values:
            body.append([method, "not available"])
            continue
        mark = " *" if method in verdict["chosen"].values() else ""
        body.append([f"{method}{mark}", *(f"{value:.1f}" for value in (mean(values), *values))])
    return Sheet(
        f"First half: validation splits at the best learning rate, %, budget of a LoRA of rank {budget}",
        ["", "mean", *tasks],
        body,
        ["* chosen: the best mean of its family."],
    )
