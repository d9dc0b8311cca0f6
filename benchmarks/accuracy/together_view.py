"""What searches say together, for readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..show.sheet import Sheet
from .methods import LORA
from .registered import PLAIN
from .view import signed

__all__ = ["draw", "setup", "sheets"]

Result = Mapping[str, Any]


def setup(result: Result) -> str:
    """What was put together, in sentences for the page."""
    told = [
        f"{one['suite']}: {', '.join(one['tasks'])}, {one['seeds']} seeds, {one['tuning_seeds']} of them for tuning"
        for one in result["searches"].values()
    ]
    return f"The second halves of the searches {', '.join(result['searches'])}. Tasks of {'; of '.join(told)}."


def sheets(result: Result) -> list[Sheet]:
    """One row per budget."""
    body, notes = [], []
    for one in result["verdicts"]:
        names = ("difference", "over_tasks", "to_plain", "plain")
        body.append([str(one["budget"]), *(signed(one[name]) for name in names)])
        chosen = "; ".join(
            f"on {result['searches'][name]['suite']}s {found['FFBA']} and {found[LORA]}"
            for name, found in one["chosen"].items()
        )
        found = "reached" if one["reached"] else "missed"
        notes.append(
            f"Budget of a LoRA of rank {one['budget']}: chosen were {chosen}; the target of +{one['target']} points "
            f"with the whole interval above 0 is {found}."
        )
    notes.append(
        "Means over all tasks. Intervals are of another draw of seeds within tasks, which choose their learning rates "
        "anew where tuning looked at all seeds; in the second column, of tasks as well. They know nothing of another "
        "choice of variants."
    )
    header = [
        "LoRA's rank",
        "FFBA chosen − LoRA chosen",
        "with tasks drawn",
        f"FFBA chosen − {LORA}",
        f"{PLAIN[1]} − {LORA}",
    ]
    return [Sheet("Points on the test splits, mean over the tasks of both", header, body, notes)]


def draw(result: Result, path: Path) -> Sequence[Path]:
    """Nothing: the searches have their pictures."""
    return []
