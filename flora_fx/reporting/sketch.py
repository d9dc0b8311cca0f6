"""The picture of a report: what stood around a read before, and what stands there now.

before   x ─┬─ W_q ─────────────────── + ── q        after   x ── [W_q ‖ W_k ‖ A_q ‖ A_k] ─┬───────── + ── q, k
            ├─ A_q ── B_q ── ×s ──────┘                                                    └─ [B_q 0; 0 B_k] ─┘
         u ─── W_o ─────────────────── + ── o                 [u, s·z] ── [W_o B_o] ── o
         z ─── B_o ── ×s ─────────────┘
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

__all__ = ["Sketch", "SketchPath", "draw"]

INK, PAPER, MUTED = "#1f2933", "#ffffff", "#7b8794"
BASE, DOWN, UP = "#3e7cb1", "#e07a3f", "#4f9d69"
LINE = 34
BOX = 118


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
    parts: list[str] = []
    y = 56
    for sketch, count in alike.items():
        height, body = _panel(sketch, count)
        parts.append(f'<g transform="translate(0 {y})">{body}</g>')
        y += height + 26
    if not sketches:
        parts.append(_text(40, y + 20, "nothing was fused", MUTED, 15))
        y += 60
    title = _text(40, 36, "flora_fx: around each read, before and after", INK, 19, weight=600)
    legend = "".join(
        _box(760 + i * 126, 20, 16, color) + _text(782 + i * 126, 33, label, INK, 13)
        for i, (color, label) in enumerate([(BASE, "base W"), (DOWN, "down A"), (UP, "up B")])
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1160 {y}" width="1160" height="{y}" '
        f'font-family="Inter, Helvetica, Arial, sans-serif">'
        f'<rect width="1160" height="{y}" fill="{PAPER}"/>{title}{legend}{"".join(parts)}</svg>\n'
    )


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


def _panel(sketch: Sketch, count: int) -> tuple[int, str]:
    written = (*sketch.accumulated, *sketch.widened)
    paths = {base: [path for path in written if path.base == base] for base in range(len(sketch.bases))}
    lines = sum(1 + len(found) for found in paths.values())
    height = max(lines * LINE, _stack_height(sketch), 108 if sketch.accumulated else 0) + 58
    gemms = len(sketch.bases) + len(sketch.downs) + len(written)
    before = f"{gemms} GEMM{'' if gemms == 1 else 's'}, {2 * len(written)} elementwise"
    times = f" ×{count}" if count > 1 else ""
    parts = [
        f'<rect x="28" y="0" width="1104" height="{height}" rx="10" fill="#f5f7fa"/>',
        _text(44, 26, f"{sketch.name}{times}", INK, 15, weight=600),
        _text(1116, 26, f"{before}  →  {sketch.gemms} GEMM{'' if sketch.gemms == 1 else 's'}", INK, 14, anchor="end"),
    ]
    parts += _before(sketch, paths, 46, height)
    parts += _after(sketch, 46, height)
    parts.append(f'<line x1="600" y1="40" x2="600" y2="{height - 12}" stroke="#cbd2d9" stroke-dasharray="3 4"/>')
    return height, "".join(parts)


def _before(sketch: Sketch, paths: dict[int, list[SketchPath]], top: int, height: int) -> list[str]:
    parts, y = [], top
    middle = (top + height - 12) / 2
    parts.append(_circle(62, middle, "x"))
    drawn: set[int] = set()
    for index, (name, _) in enumerate(sketch.bases):
        parts += [_wire(76, middle, 110, y + 13), _box(110, y, BOX, BASE, f"W {name}")]
        output = y + 13
        parts.append(_wire(110 + BOX, output, 556, output))
        if paths[index]:
            parts.append(_circle(530, output, "+"))
        for write in paths[index]:
            y += LINE
            parts.append(_wire(110 + BOX, y + 13, 498, y + 13))
            if write.down is not None and write.down not in drawn:
                drawn.add(write.down)
                low = sketch.downs[write.down][0]
                parts += [_wire(76, middle, 110, y + 13), _box(110, y, BOX, DOWN, f"A {low}")]
            else:
                parts.append(_circle(110 + BOX, y + 13, "z"))
            parts.append(_box(254, y, BOX, UP, f"B {write.up}"))
            parts += [
                _wire(498, y + 13, 530, output + 11),
                _circle(450, y + 13, f"×{write.scale:.3g}", wide=True),
            ]
        y += LINE
    return parts


def _after(sketch: Sketch, top: int, height: int) -> list[str]:
    middle = (top + height - 12) / 2
    apart, among = sketch.downs[: sketch.apart], sketch.downs[sketch.apart :]
    first = [*_slices(sketch.bases, BASE, "W"), *_slices(among, DOWN, "A")]
    stacks = [stack for stack in (first, _slices(apart, DOWN, "A")) if stack]
    total = sum(len(stack) * 26 for stack in stacks) + 14 * (len(stacks) - 1)
    y = middle - total / 2
    parts = [_circle(642, middle, "x, z" if sketch.widened else "x", wide=bool(sketch.widened))]
    parts.append(_wire(668 if sketch.widened else 656, middle, 690, middle))
    parts += [_box(862, y + 26 * column.base, 112, UP, f"B {column.up}", radius=0) for column in sketch.widened]
    for stack in stacks:
        top_of_stack = y
        for color, label in stack:
            parts.append(_box(690, y, 170, color, label, radius=0))
            y += 26
        parts.append(
            f'<rect x="690" y="{top_of_stack}" width="170" height="{y - top_of_stack}" rx="4" fill="none" '
            f'stroke="{INK}" stroke-width="1.6"/>'
        )
        y += 14
    right = 974 if sketch.widened else 860
    if sketch.accumulated:
        size = 74
        left, upper = 916, middle - size / 2
        parts.append(_wire(860, middle, left, middle))
        parts.append(
            f'<rect x="{left}" y="{upper}" width="{size}" height="{size}" rx="4" fill="#e4e7eb" stroke="{INK}" '
            'stroke-width="1.6"/>'
        )
        rows = list(dict.fromkeys(w.base for w in sketch.accumulated))
        columns = list(dict.fromkeys(w.down for w in sketch.accumulated))
        high, wide = size / len(rows), size / len(columns)
        for path in sketch.accumulated:
            x, y = left + columns.index(path.down) * wide, upper + rows.index(path.base) * high
            parts.append(f'<rect x="{x + 2}" y="{y + 2}" width="{wide - 4}" height="{high - 4}" rx="2" fill="{UP}"/>')
        parts.append(_text(left + size / 2, upper - 7, "y + s·Bz", MUTED, 12, anchor="middle"))
        parts.append(_wire(left + size, middle, 1030, middle))
    else:
        parts.append(_wire(right, middle, 1030, middle))
    names = [name for name, _ in sketch.bases]
    for index, name in enumerate(names):
        parts.append(_text(1040, middle + 5 + (index - (len(names) - 1) / 2) * 18, name, INK, 13))
    return parts


def _slices(members: Sequence[tuple[str, int]], color: str, letter: str) -> list[tuple[str, str]]:
    return [(color, f"{letter} {name}  [{rows}]") for name, rows in members]


def _stack_height(sketch: Sketch) -> int:
    return (len(sketch.bases) + len(sketch.downs)) * 26 + (14 if sketch.apart else 0)


def _box(x: float, y: float, width: float, color: str, label: str = "", radius: int = 4) -> str:
    text = _text(x + width / 2, y + 18, label[:24], PAPER, 12.5, anchor="middle") if label else ""
    height = 26 if label else 16
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{color}"/>{text}'


def _circle(x: float, y: float, label: str, wide: bool = False) -> str:
    half = 25 if wide else 13
    return (
        f'<rect x="{x - half}" y="{y - 12}" width="{2 * half}" height="24" rx="12" fill="{PAPER}" stroke="{INK}"/>'
        + _text(x, y + 5, label, INK, 13, anchor="middle")
    )


def _wire(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{MUTED}" stroke-width="1.4"/>'


def _text(x: float, y: float, text: str, color: str, size: float, *, anchor: str = "start", weight: int = 400) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{color}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
