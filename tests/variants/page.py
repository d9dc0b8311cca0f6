"""docs/variants.md, from the rows: ``python -m tests.variants.page``."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from .row import Fate, Row
from .rows import ABSENT, ROWS

ROOT = Path(__file__).parents[2]

PAGE = ROOT / "docs" / "variants.md"

_HEAD = """\
# Variants of LoRA, and what becomes of them

Written by `python -m tests.variants.page` from `tests/variants/rows.py`; `tests/variants/test_variants.py` proves
every cell: outputs, and in training gradients, are those of the unfused model in float64 (quantized bases in
float32), the numbers of adapters and GEMMs are as they stand here, and each decline has this reason. PEFT 0.21.2,
torch 2.13, CPU.

- **captured**: `flora_fx.fuse(flora_fx.capture(model, …))`, eval mode.
- **compiled**: `torch.compile(model, backend="flora")`, eval mode; **trained**: the same, one step of training.

**fused** *n* (*a* → *b*): all *n* adapters are in the projections they belong to; the graph had *a* GEMMs and has
*b*. **partly**: what can be is (an up-projection accumulates where its A stays a GEMM of its own). *declined* and
*left*: the model computes what it did, as it did. *no graph*: PEFT or torch refuse the unfused model, too.

DoRA in a captured graph is y = b + m·(W x + s·B A x). m, the magnitudes over the norms of W + s·B A, is a stored
vector that is computed anew when a weight changes, so the norms leave the graph. Under Dynamo PEFT's DoRA layers come
as graphs of a piece each, where no adapter stands beside its projection.

Adapters in float32 on a base in bfloat16 (PEFT's default): the A's of one value pack among themselves, bitwise
exactly; `FuseConfig(allow_cast=True)` joins them with the base, at 0.96 to 1.05 of the mean error that PEFT itself
has to float64 (`tests/variants/test_dtypes.py`; twelve seeds).

Most rows adapt four projections, q, k and v of one value and o behind them, beside a head without an adapter: 13
GEMMs.
"""


def markdown() -> str:
    """The page."""
    parts = [_HEAD]
    for chapter, rows in groupby(ROWS, key=lambda row: row.chapter):
        lines = [
            f"## {chapter}",
            "",
            "| variant | PEFT is given | captured | compiled | trained |",
            "|---|---|---|---|---|",
        ]
        parts.append("\n".join([*lines, *map(_line, rows)]) + "\n")
    absent = [f"- {name}: {why}." for name, why in ABSENT.items()]
    parts.append("\n".join(["## Not in this table", "", *absent]) + "\n")
    return "\n".join(parts)


def _line(row: Row) -> str:
    name = f"{row.name} (where {row.needs} is installed)" if row.needs else row.name
    given = row.given.replace("|", "\\|")
    return f"| {name} | `{given}` | {_cell(row.captured)} | {_cell(row.compiled)} | {_cell(row.trained)} |"


def _cell(fate: Fate) -> str:
    verdict = fate.verdict
    if fate.fused:
        gemms = f" ({fate.gemms[0]} → {fate.gemms[1]})" if fate.gemms else ""
        verdict = f"**{verdict}** {fate.fused}{gemms}"
    else:
        verdict = f"*{verdict}*"
    told = fate.why or "; ".join(reason.value for reason, *_ in fate.declines)
    return f"{verdict}: {told}" if told else verdict


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
    print(PAGE)
