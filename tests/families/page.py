"""docs/architectures.md, from the rows: ``python -m tests.families.page``."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from .row import Fate, Row
from .rows import ROWS

ROOT = Path(__file__).parents[2]

PAGE = ROOT / "docs" / "architectures.md"

_HEAD = """\
# Architectures

Written by `python -m tests.families.page` from `tests/families/rows.py`; `tests/families/test_families.py` proves
every cell: outputs are those of the unfused model within 1e-10 of the largest, in float64; the numbers of adapters
and GEMMs are as they stand here, and each decline has this reason. transformers 5.23, diffusers {diffusers}, PEFT
0.21.2, torch 2.13, CPU, eval mode.

Every model is small (two layers, random weights: no bias is zero, no norm's weight is one) and has a LoRA on all its
linear layers but the head, where nothing else is said: ranks 4, 2 and 6 by turns, so that siblings differ, scale 1.5,
B not zero.

- **captured**: `flora_fx.fuse(flora_fx.capture(model, …))`.
- **compiled**: `torch.compile(model, backend="flora")`, where each B stays its own parameter.

**n** (*a* → *b*): the adapters that are in the projections they belong to, and the GEMMs of all graphs before and
after. Both counts hold what has no adapter: heads, routers, products of attention that a model writes out, experts.
*declined*, and whatever is not fused: the model computes what it did, as it did. *no graph*: torch.export refuses the
unfused model, too.

{families} families, {rows} rows. All adapters are fused in {all} of them in both ways.
"""


def markdown() -> str:
    """The page."""
    both = [row for row in ROWS if all(fate.fused == row.adapters for fate in (row.captured, row.compiled))]
    counts = {"families": len({row.name for row in ROWS}), "rows": len(ROWS), "all": len(both)}
    parts = [_HEAD.format(diffusers=_pinned("diffusers"), **counts)]
    for chapter, rows in groupby(ROWS, key=lambda row: row.chapter):
        lines = [
            f"## {chapter}",
            "",
            "| family | what it has | adapters | captured | compiled |",
            "|---|---|---|---|---|",
        ]
        parts.append("\n".join([*lines, *map(_line, rows)]) + "\n")
    return "\n".join(parts)


def _pinned(package: str) -> str:
    """The version that the tests run with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def _line(row: Row) -> str:
    cells = (_cell(row, row.captured), _cell(row, row.compiled))
    return f"| {row.name} | {row.given} | {row.adapters} | {cells[0]} | {cells[1]} |"


def _cell(row: Row, fate: Fate) -> str:
    if fate.refused:
        return f"*no graph*: {fate.why}"
    of = "" if fate.fused == row.adapters else f" of {row.adapters}"
    parts = [f"**{fate.fused}**{of} ({fate.gemms[0]} → {fate.gemms[1]})"]
    parts += [f"*declined* {n}: {reason.value}" + f" ({told})" * bool(told) for reason, n, told in fate.declines]
    parts += [fate.why] * bool(fate.why)
    return "; ".join(parts)


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
    print(PAGE)
