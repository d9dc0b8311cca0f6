"""The table of rooms in docs/architecture.md: ``python -m tests.house.page`` writes it between its marks."""

from __future__ import annotations

from .rooms import HOUSES, ROOT

__all__ = ["PAGE", "table", "written"]

PAGE = ROOT / "docs" / "architecture.md"

_MARKS = ("<!-- rooms: python -m tests.house.page -->\n", "<!-- end of rooms -->\n")


def table() -> str:
    """The rooms, in order."""
    lines = ["| house | room | what is there |", "|---|---|---|"]
    for house in HOUSES:
        for index, room in enumerate(house.rooms):
            files = ", ".join(f"`{room.path}/{file}`" for file in room.files)
            lines.append(f"| {'' if index else house.name} | {files or f'`{room.path}/`'} | {room.what} |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the table as it is now.

    Args:
        page: with the marks.
    """
    before, _, rest = page.partition(_MARKS[0])
    _, mark, after = rest.partition(_MARKS[1])
    assert mark, "docs/architecture.md has lost its marks"
    return f"{before}{_MARKS[0]}{table()}{_MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
