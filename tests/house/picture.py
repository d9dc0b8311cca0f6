"""docs/architecture.svg, from the code's imports: ``python -m tests.house.picture``."""

from __future__ import annotations

from html import escape

from .rooms import HOUSES, ROOT, House, Room, edges, house_of

__all__ = ["PICTURE", "svg"]

PICTURE = ROOT / "docs" / "architecture.svg"

_ROWS = (
    ("benchmarks", "programs"),
    ("export",),
    ("face", "checkpoint", "adapters", "measuring"),
    ("passes",),
    ("graphs",),
)
"""Houses from the top to the bottom: each imports only what is below it."""

_BOX, _ALONG, _DOWN = (104, 34), 136, 48  # of a room; from one to the next
_MARGIN, _HEAD, _GAP = 20, 62, 22

_STYLE = """
  :root { --paper: #ffffff; --ink: #25292e; --pale: #6b7480; --line: #8a929c; --panel: #f4f6f8; --box: #ffffff; }
  @media (prefers-color-scheme: dark) {
    :root { --paper: #0d1117; --ink: #e6edf3; --pale: #9aa4af; --line: #7d8590; --panel: #161b22; --box: #21262d; }
  }
  text { font-family: Inter, Helvetica, Arial, sans-serif; font-size: 12.5px; fill: var(--ink); }
  .name { font-size: 15px; font-weight: 600; }
  .pale { fill: var(--pale); font-size: 11.5px; }
  .panel { fill: var(--panel); }
  .box { fill: var(--box); stroke: var(--line); stroke-width: 1; }
  .arrow { fill: none; stroke: var(--line); stroke-width: 1.3; marker-end: url(#head); }
  #head path { fill: var(--line); }
"""


def svg() -> str:
    """The picture."""
    houses = {house.name: house for house in HOUSES}
    parts: list[str] = []
    top, right = _MARGIN + 30, 0
    for row in _ROWS:
        left, tallest = _MARGIN, 0
        for name in row:
            width, height, drawn = _house(houses[name], left, top)
            parts += drawn
            left, tallest = left + width + _GAP, max(tallest, height)
        top, right = top + tallest + _GAP, max(right, left - _GAP)
    size = f"{right + _MARGIN} {top - _GAP + _MARGIN}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="Rooms and their imports">'
        f"\n<style>{_STYLE}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>\n'
        '<rect width="100%" height="100%" fill="var(--paper)"/>\n'
        + _text(
            _MARGIN, _MARGIN + 12, "An arrow: imports. A house imports the houses named below its own name.", "pale"
        )
    )
    return "\n".join([head, *parts, "</svg>\n"])


def _house(house: House, left: int, top: int) -> tuple[int, int, list[str]]:
    """Width, height, and the elements of a house."""
    inside = {pair for pair in edges() if set(pair) <= set(house.rooms)}
    depths: dict[Room, int] = {}
    for room in house.rooms:  # each after those that it imports
        depths[room] = max((depths[other] + 1 for one, other in inside if one is room), default=0)
    columns = [[room for room in house.rooms if depths[room] == depth] for depth in range(max(depths.values()) + 1)]
    used = sorted({house_of(other) for one, other in edges() if one in house.rooms and other not in house.rooms})
    folder = house.rooms[0].path.partition("/")[0]
    told = f"{folder}/, imports {', '.join(used) or 'no other house'}"
    height = _HEAD + max(map(len, columns)) * _DOWN
    width = max(_ALONG * len(columns) - (_ALONG - _BOX[0]) + 2 * 16, 7 * len(told) + 32)
    drawn = [
        f'<rect class="panel" x="{left}" y="{top}" width="{width}" height="{height}" rx="8"/>',
        _text(left + 16, top + 24, house.name, "name"),
        _text(left + 16, top + 42, told, "pale"),
    ]
    where = {
        room: (left + 16 + _ALONG * depth, top + _HEAD - 8 + _DOWN * index)
        for depth, column in enumerate(columns)
        for index, room in enumerate(column)
    }
    drawn += [_arrow(where[one], where[other]) for one, other in _drawn_once(inside, house.rooms)]
    for room, (x, y) in where.items():
        drawn.append(f'<rect class="box" x="{x}" y="{y}" width="{_BOX[0]}" height="{_BOX[1]}" rx="5"/>')
        drawn.append(_text(x + _BOX[0] / 2, y + 21, _name(room), anchor="middle"))
    return width, height, drawn


def _drawn_once(pairs: set[tuple[Room, Room]], rooms: tuple[Room, ...]) -> list[tuple[Room, Room]]:
    """Those that no way round says as well, in the order of the rooms."""
    reached: dict[Room, set[Room]] = {}
    for room in rooms:
        direct = {other for one, other in pairs if one is room}
        reached[room] = direct.union(*(reached[other] for other in direct))
    kept = [
        (one, other)
        for one, other in pairs
        if not any(other in reached[between] for start, between in pairs if start is one and between is not other)
    ]
    return sorted(kept, key=lambda pair: (rooms.index(pair[0]), rooms.index(pair[1])))


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From the left side of one box to the right side of one further to the left, below those that stand between."""
    x1, y1 = start[0], start[1] + _BOX[1] // 2
    x2, y2 = end[0] + _BOX[0], end[1] + _BOX[1] // 2
    gap = _ALONG - _BOX[0]
    if x1 - x2 == gap:
        way = f"C{x1 - gap // 2} {y1} {x2 + gap // 2} {y2} {x2 + 1} {y2}"
    else:
        lane = max(y1, y2) + _DOWN // 2
        way = f"C{x1 - gap // 2} {y1} {x1 - gap // 2} {lane} {x1 - gap} {lane} H{x2 + gap} "
        way += f"C{x2 + gap // 2} {lane} {x2 + gap // 2} {y2} {x2 + 1} {y2}"
    return f'<path class="arrow" d="M{x1} {y1} {way}"/>'


def _name(room: Room) -> str:
    return room.name.partition(": ")[2] or f"{room.path.rpartition('/')[2]}/"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    of = f' class="{kind}"' if kind else ""
    return f'<text{of} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
    print(PICTURE)
