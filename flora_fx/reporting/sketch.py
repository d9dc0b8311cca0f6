"""The picture of a report: what stood around a read before, and what stands there now.

before   x ─┬─ W_q ─────────────────── + ── q        after   x ── [W_q ‖ W_k ‖ A_q ‖ A_k] ─┬─ y ──────────── + ── q, k
            ├─ A_q ── B_q ── ×s ──────┘                                                    └─ z ─ [B 0; 0 B] ─┘
         u ─── W_o ─────────────────── + ── o                 [u, s·z] ── [W_o B_o] ── o
         z ─── B_o ── ×s ─────────────┘
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .shapes import HIGH, Kind, box, bracket, circle, frame, sheet, text, wire

__all__ = ["Sketch", "SketchPath", "draw"]

LINE = 34
"""From one row before to the next."""
BOX = 118
WIDTH, SPLIT = 1160, 600
_TOP = 46
_NOTE = (
    "Boxes are not to scale: [n] is how many rows a weight has. A frame is one weight in memory, read by one GEMM; "
    "grey in a frame are zeros."
)
_ELSEWHERE = " A z without a wire is a low-rank value of another read."


@dataclass(frozen=True)
class SketchPath:
    """One path: the indices of its base and down-projection, its up-projection's name, its scale.

    The down-projection is None where it stands in another group.
    """

    base: int
    down: int | None
    up: str
    scale: float


@dataclass(frozen=True)
class Sketch:
    """One group of a fused graph.

    Attributes:
        name: of the pack, or of the projection where there is none.
        reads: the value that is read.
        bases, downs: (name, rows) in the order they are stored.
        accumulated: the paths that are GEMMs of their own.
        widened: the paths that are further columns of their base.
        gemms: GEMM launches after: packs and accumulations.
        apart: how many downs, from the first on, are no rows under the bases.
    """

    name: str
    reads: str
    bases: tuple[tuple[str, int], ...]
    downs: tuple[tuple[str, int], ...]
    accumulated: tuple[SketchPath, ...]
    widened: tuple[SketchPath, ...]
    gemms: int
    apart: int


def draw(sketches: Sequence[Sketch], pattern: Callable[[str], str]) -> str:
    """The SVG text; sketches that are alike but for layer numbers are drawn once, with their count."""
    alike: Counter[Sketch] = Counter(_anonymous(sketch, pattern) for sketch in sketches)
    title = "flora_fx: each value that is read, before and after fusing"
    parts = [
        text(40, 36, title, "ink", 19, weight=600),
        *(
            box(760 + i * 126, 20, 16, kind, height=16) + text(782 + i * 126, 33, label, "ink", 13)
            for i, (kind, label) in enumerate(_LEGEND)
        ),
        text(46, 66, "before: a GEMM for each W, A and B", "muted", 14, weight=600),
        text(SPLIT + 18, 66, "after: a GEMM for each frame", "muted", 14, weight=600),
    ]
    y = 80.0
    for sketch, count in alike.items():
        height, body = _panel(sketch, count)
        parts.append(f'<g transform="translate(0 {y:g})">{body}</g>')
        y += height + 20
    if not sketches:
        parts.append(text(40, y + 14, "nothing was fused", "muted", 15))
        y += 40
    elsewhere = any(path.down is None for sketch in alike for path in (*sketch.accumulated, *sketch.widened))
    parts.append(text(40, y + 12, _NOTE + (_ELSEWHERE if elsewhere else ""), "muted", 12.5))
    told = "; ".join(f"{_name(sketch, count)}: {_counts(sketch)}" for sketch, count in alike.items())
    return sheet(WIDTH, y + 30, title, told or "nothing was fused", "".join(parts))


_LEGEND: tuple[tuple[Kind, str], ...] = (("base", "base W"), ("down", "down A"), ("up", "up B"))


def _anonymous(sketch: Sketch, pattern: Callable[[str], str]) -> Sketch:
    return Sketch(
        pattern(sketch.name),
        "x",
        tuple((_leaf(name), rows) for name, rows in sketch.bases),
        tuple((_leaf(name), rows) for name, rows in sketch.downs),
        tuple(replace(path, up=_leaf(path.up)) for path in sketch.accumulated),
        tuple(replace(path, up=_leaf(path.up)) for path in sketch.widened),
        sketch.gemms,
        sketch.apart,
    )


def _leaf(name: str) -> str:
    """The part of a weight's name that says which projection it is.

    >>> _leaf("model.layers.0.self_attn.q_proj.base_layer.weight")
    'q_proj'
    """
    noise = ("weight", "codes", "base_layer", "default", "lora_A", "lora_B", "flora_A", "flora_B")
    parts = [part for part in name.split(".") if part not in noise]
    return parts[-1] if parts else name


def _name(sketch: Sketch, count: int) -> str:
    return f"{sketch.name} ×{count}" if count > 1 else sketch.name


def _counts(sketch: Sketch) -> str:
    written = len(sketch.accumulated) + len(sketch.widened)
    gemms = len(sketch.bases) + len(sketch.downs) + written
    return f"{_gemms(gemms)}, {2 * written} elementwise  →  {_gemms(sketch.gemms)}"


def _gemms(count: int) -> str:
    return f"{count} GEMM{'' if count == 1 else 's'}"


def _panel(sketch: Sketch, count: int) -> tuple[float, str]:
    written = (*sketch.accumulated, *sketch.widened)
    paths = {base: [path for path in written if path.base == base] for base in range(len(sketch.bases))}
    lines = sum(1 + len(found) for found in paths.values()) + len(_unread(sketch))
    low, after = _after(sketch)
    height = max(lines * LINE, low) + 58
    shift = (height - 58 - low) / 2
    parts = [
        f'<rect class="fx-panel" x="28" y="0" width="1104" height="{height:g}" rx="10"/>',
        text(44, 26, _name(sketch, count), "ink", 15, weight=600),
        text(1116, 26, _counts(sketch), "ink", 14, anchor="end"),
        *_before(sketch, paths, height),
        f'<g transform="translate(0 {_TOP + shift:g})">{"".join(after)}</g>',
        f'<line class="fx-split" x1="{SPLIT}" y1="40" x2="{SPLIT}" y2="{height - 12:g}"/>',
    ]
    return height, "".join(parts)


def _before(sketch: Sketch, paths: dict[int, list[SketchPath]], height: float) -> list[str]:
    """Each projection with its paths below it; a value z that several B's read has a wire to each of them."""
    wires, parts, y = [], [], float(_TOP)
    middle = (_TOP + height - 12) / 2
    readers = Counter(path.down for found in paths.values() for path in found)
    right, branch = 110 + BOX, 110 + BOX + 12
    drawn: dict[int, float] = {}
    for index, (name, _) in enumerate(sketch.bases):
        output = y + 13
        wires += [wire((76, middle), (110, output)), wire((right, output), (556, output))]
        parts.append(box(110, y, BOX, "base", f"W {name}"))
        if paths[index]:
            parts.append(circle(530, output, "+"))
        for path in paths[index]:
            y += LINE
            level = y + 13
            if path.down is None:
                parts.append(circle(right, level, "z"))
            elif path.down in drawn:
                wires.append(wire((branch, drawn[path.down]), (branch, level), (254, level)))
            else:
                drawn[path.down] = level
                low = sketch.downs[path.down][0] if readers[path.down] == 1 else "shared"
                wires.append(wire((76, middle), (110, level)))
                parts.append(box(110, y, BOX, "down", f"A {low}"))
            start = 254 if path.down in drawn and drawn[path.down] != level else right
            wires.append(wire((start, level), (498, level), (530, output + 11)))
            parts.append(box(254, y, BOX, "up", f"B {path.up}"))
            parts.append(circle(450, level, f"×{path.scale:.3g}", wide=True))
        y += LINE
    for name, _ in (sketch.downs[unread] for unread in _unread(sketch)):
        wires += [wire((76, middle), (110, y + 13)), wire((right, y + 13), (254, y + 13))]
        parts += [box(110, y, BOX, "down", f"A {name}"), circle(267, y + 13, "z")]
        y += LINE
    return [*wires, circle(62, middle, "x"), *parts]


def _unread(sketch: Sketch) -> list[int]:
    """The down-projections whose value only other groups read."""
    return sorted(set(range(len(sketch.downs))) - {path.down for path in (*sketch.accumulated, *sketch.widened)})


@dataclass(frozen=True)
class _Stack:
    """Rows that are read together: one weight.

    Attributes:
        top: its height in the panel.
        rows: kind and label of each.
    """

    top: float
    rows: tuple[tuple[Kind, str], ...]

    @property
    def bottom(self) -> float:
        return self.top + len(self.rows) * HIGH

    @property
    def centre(self) -> float:
        return (self.top + self.bottom) / 2

    def levels(self, kind: Kind) -> list[float]:
        """The middle of each row of a kind."""
        return [self.top + (i + 0.5) * HIGH for i, (found, _) in enumerate(self.rows) if found == kind]


def _stacks(sketch: Sketch) -> list[_Stack]:
    readers = Counter(path.down for path in (*sketch.accumulated, *sketch.widened))
    downs = [("shared" if readers[index] > 1 else name, rows) for index, (name, rows) in enumerate(sketch.downs)]
    first = (*_slices(sketch.bases, "base", "W"), *_slices(downs[sketch.apart :], "down", "A"))
    found: list[_Stack] = []
    for rows in (first, _slices(downs[: sketch.apart], "down", "A")):
        if rows:
            found.append(_Stack(found[-1].bottom + 14 if found else 0, tuple(rows)))
    return found


def _after(sketch: Sketch) -> tuple[float, list[str]]:
    """How high it is, and the frames; y goes past those of B's that accumulate, to the sum."""
    stacks = _stacks(sketch)
    low = stacks[-1].bottom
    elsewhere = any(path.down is None for path in sketch.widened)
    wires = [wire((656, low / 2), (690, stack.centre)) for stack in stacks]
    parts = [circle(642, low / 2, "x, z" if elsewhere else "x", wide=elsewhere)]
    for stack in stacks:
        for i, (kind, label) in enumerate(stack.rows):
            parts.append(box(690, stack.top + i * HIGH, 170, kind, label, radius=0, height=HIGH - 1))
        columns = sketch.widened if stack is stacks[0] else ()
        parts += [box(861, path.base * HIGH, 113, "up", f"B {path.up}", radius=0, height=HIGH - 1) for path in columns]
        parts.append(frame(690, stack.top, 284 if columns else 170, stack.bottom - stack.top))
    order = [*range(sketch.apart, len(sketch.downs)), *range(sketch.apart)]
    levels = dict(zip(order, [level for stack in stacks for level in stack.levels("down")], strict=True))
    if sketch.widened and not elsewhere:
        wires.append(wire((860, stacks[-1].centre), (917, stacks[-1].centre), (917, stacks[0].bottom)))
        parts.append(text(872, stacks[-1].centre - 6, "z", "muted", 12))
    for unread in _unread(sketch):
        level = levels.pop(unread)
        wires.append(wire((860, level), (905, level)))
        parts.append(circle(918, level, "z"))
    if sketch.bases:
        base, right = len(sketch.bases) * HIGH / 2, 974 if sketch.widened else 860
        wires.append(wire((right, base), (1030, base)))
        parts += bracket(1040, base, [name for name, _ in sketch.bases])
        if sketch.accumulated:
            bottom, blocks = _accumulated(sketch, len(stacks), right, base, [*levels.values()])
            low = max(low, bottom)
            parts += [*blocks, text(right + 12, base - 6, "y", "muted", 12), circle(1008, base, "+")]
    return low, [*wires, *parts]


def _accumulated(
    sketch: Sketch, stacks: int, right: float, base: float, levels: Sequence[float]
) -> tuple[float, list[str]]:
    """How low it ends, and the B's that are GEMMs: a column for each low-rank value, a row for each base."""
    rows = list(dict.fromkeys(path.base for path in sketch.accumulated))
    columns = list(dict.fromkeys(path.down for path in sketch.accumulated))
    cell = 24
    wide, high = cell * len(columns) + 4, cell * len(rows) + 4
    left = 985 - wide
    centre = sum(levels) / len(levels) if levels else base + 40
    upper = max(centre - high / 2, base + 12)
    level = upper + high / 2
    parts = [wire((left + wide, level), (1008, level), (1008, base + 12))]
    if columns == [None] or not levels:
        parts += [wire((left - 21, level), (left, level)), circle(left - 34, level, "z")]
    else:
        parts += [wire((right, centre), (left - 14, centre), (left - 14, level), (left, level))]
        parts.append(text(right + 12, centre - 6, "z", "muted", 12))
    together = sketch.gemms - stacks == 1
    if together:
        parts.append(frame(left, upper, wide, high, zeros=len(rows) * len(columns) > 1))
    for path in sketch.accumulated:
        x, y = left + 2 + columns.index(path.down) * cell, upper + 2 + rows.index(path.base) * cell
        parts.append(box(x + 1, y + 1, cell - 2, "up", radius=2, height=cell - 2))
        if not together:
            parts.append(frame(x + 1, y + 1, cell - 2, cell - 2))
    scales = {f"{path.scale:.3g}" for path in sketch.accumulated}
    scale = f"{scales.pop()}·" if len(scales) == 1 else "s·"
    parts.append(text(left + wide / 2, upper + high + 15, f"{scale}B z", "muted", 12, anchor="middle"))
    return upper + high + 18, parts


def _slices(members: Sequence[tuple[str, int]], kind: Kind, letter: str) -> list[tuple[Kind, str]]:
    return [(kind, f"{letter} {name}  [{rows}]") for name, rows in members]
