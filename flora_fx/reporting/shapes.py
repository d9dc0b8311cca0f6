"""Shapes of a report's picture: SVG in classes, so that its colours follow a light or a dark reader."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

__all__ = ["HIGH", "Anchor", "Kind", "box", "bracket", "circle", "frame", "sheet", "text", "wire"]

HIGH = 26
"""Of a box with a label."""

Anchor = Literal["start", "middle", "end"]
Kind = Literal["base", "down", "up"]

_STYLE = """
.fx { --paper: #ffffff; --ink: #1f2933; --muted: #616e7c; --line: #7b8794; --panel: #f5f7fa; --zero: #e4e7eb;
  --base: #2f6ca3; --down: #b8530f; --up: #2f7d4c; font-family: Inter, Helvetica, Arial, sans-serif; }
@media (prefers-color-scheme: dark) { .fx { --paper: #0d1117; --ink: #e6edf3; --muted: #9aa4af; --line: #7d8590;
  --panel: #161b22; --zero: #2d333b; --base: #3b7fbd; --down: #c2621c; --up: #388a58; } }
.fx-paper { fill: var(--paper); } .fx-panel { fill: var(--panel); } .fx-ink { fill: var(--ink); }
.fx-muted { fill: var(--muted); } .fx-label { fill: #ffffff; } .fx-zero { fill: var(--zero); }
.fx-base { fill: var(--base); } .fx-down { fill: var(--down); } .fx-up { fill: var(--up); }
.fx-wire { fill: none; stroke: var(--line); stroke-width: 1.4; }
.fx-frame { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.fx-node { fill: var(--paper); stroke: var(--ink); }
.fx-split { stroke: var(--line); stroke-dasharray: 3 4; opacity: 0.6; }
"""


def sheet(width: float, height: float, title: str, description: str, body: str) -> str:
    """The whole SVG; what a screen reader says of it are title and description."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fx" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="fx-title fx-description">'
        f'<title id="fx-title">{escape(title)}</title><desc id="fx-description">{escape(description)}</desc>'
        f'<style>{_STYLE}</style><rect class="fx-paper" width="{width}" height="{height}"/>{body}</svg>\n'
    )


def box(x: float, y: float, width: float, kind: Kind, label: str = "", *, radius: int = 4, height: float = HIGH) -> str:
    """A weight, with its name; without one a piece of a larger weight, or of the legend."""
    inside = text(x + width / 2, y + 18, label[:24], "label", 12.5, anchor="middle") if label else ""
    return f'<rect class="fx-{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"/>{inside}'


def frame(x: float, y: float, width: float, height: float, *, zeros: bool = False) -> str:
    """The edge of one weight in memory; `zeros` shows what of it is multiplied for nothing."""
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"'
    return (f'<rect class="fx-zero" {size}/>' if zeros else "") + f'<rect class="fx-frame" {size}/>'


def circle(x: float, y: float, label: str, *, wide: bool = False) -> str:
    """A value, a sum or a scale."""
    half = 25 if wide else 13
    return f'<rect class="fx-node" x="{x - half:g}" y="{y - 12:g}" width="{2 * half}" height="24" rx="12"/>' + text(
        x, y + 5, label, "ink", 13, anchor="middle"
    )


def wire(*points: tuple[float, float]) -> str:
    """A line through points."""
    return f'<polyline class="fx-wire" points="{" ".join(f"{x:g},{y:g}" for x, y in points)}"/>'


def bracket(x: float, y: float, names: Sequence[str]) -> list[str]:
    """Names one below the other, around a height."""
    return [text(x, y + 5 + (i - (len(names) - 1) / 2) * 18, name, "ink", 13) for i, name in enumerate(names)]


def text(
    x: float, y: float, content: str, kind: str, size: float, *, anchor: Anchor = "start", weight: int = 400
) -> str:
    """A line of text; `kind` is ink, muted or label."""
    return (
        f'<text class="fx-{kind}" x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(content)}</text>'
    )
