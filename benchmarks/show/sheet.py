"""A table of results, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flora_fx.errors import require

__all__ = ["Sheet"]


@dataclass(frozen=True)
class Sheet:
    """Cells of text under a header.

    Attributes:
        title: what it shows.
        header: column names; the first column is text, the others are numbers.
        rows: cells; a shorter row's last cell spans the columns that are missing.
        notes: sentences below.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())

    def markdown(self) -> str:
        """As a Markdown table.

        >>> print(Sheet("Sums", ["", "ms"], [["few", "1.0"], ["refused"]], ["Done by hand."]).markdown())
        **Sums**
        <BLANKLINE>
        |  | ms |
        |---|---:|
        | few | 1.0 |
        | refused |  |
        <BLANKLINE>
        Done by hand.
        """
        width = len(self.header)
        lines = [_line(self.header), "|---|" + "---:|" * (width - 1)]
        lines += [_line([*row, *[""] * (width - len(row))]) for row in self.rows]
        return "\n".join([f"**{self.title}**", "", *lines, *(f"\n{note}" for note in self.notes)])

    def rich(self) -> Any:
        """As a `rich.table.Table`.

        Raises:
            MissingExtraError: rich is not installed.
        """
        tables, box = require("rich.table", "cli"), require("rich.box", "cli")
        table = tables.Table(
            title=self.title,
            caption=" ".join(self.notes),
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left", no_wrap=bool(index))
        for row in self.rows:
            table.add_row(*row, style="green" if row[0].startswith("fused") else "")
        return table


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
