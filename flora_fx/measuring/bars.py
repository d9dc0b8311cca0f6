"""Grouped bars relative to the base: what each form of the adapter adds to its latency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_fx.errors import require

from .method import Timing

__all__ = ["INK", "PALE", "STYLE", "draw_bars", "require_figures", "write"]

INK, PALE = "#25292e", "#8a929c"
STYLE = {"font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "flora_fx", "svg.fonttype": "path"}

_DARK = "@media (prefers-color-scheme: dark) { svg { filter: invert(0.93) hue-rotate(180deg); } }"

Panels = Mapping[str, Mapping[str, Mapping[str, Timing]]]


def draw_bars(
    panels: Panels,
    colours: Mapping[str, str],
    path: Path,
    *,
    title: str,
    note: str,
    base: str = "base",
    caption: str = "",
) -> list[Path]:
    """Draw one panel per runner with bars of added latency, in percent of the base, and their 95% intervals.

    Args:
        panels: runner -> metric (``"TTFT"``, ``"TPOT"``) -> contender -> timing.
        colours: contender -> colour, in the order of the bars; other contenders are left to the table.
        path: without a suffix; ``.svg`` and ``.png`` are written.
        title: what was measured.
        note: one line below it, for the conditions.
        base: what the base is called.
        caption: a second line below the title, for what the bars say against us.

    Returns:
        The two files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib, figures = require_figures()
    with matplotlib.rc_context(STYLE):
        # A bare Figure draws without a display and leaves pyplot's global state alone.
        bars = max(len(colours.keys() & timings) for metrics in panels.values() for timings in metrics.values())
        width = max(4.5, 0.75 * bars)  # of a panel: percentages above the bars must not touch
        figure = figures.Figure(figsize=(width * max(2, len(panels)), 4.2), facecolor="white", layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (runner, metrics) in zip(axes, panels.items(), strict=True):
            _draw_panel(axis, runner, metrics, colours, base)
        axes[0].set_ylabel(f"latency added to {'the base' if base == 'base' else base}", color=PALE)
        drawn = {name for metrics in panels.values() for timings in metrics.values() for name in timings}
        handles = [
            matplotlib.patches.Patch(facecolor=colour, label=name) for name, colour in colours.items() if name in drawn
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
        return write(figure, path, title=title, note=note, caption=caption)


def require_figures() -> tuple[Any, Any]:
    """The modules ``matplotlib`` and ``matplotlib.figure``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return require("matplotlib", "cli"), require("matplotlib.figure", "cli")


def write(figure: Any, path: Path, *, title: str, note: str, caption: str = "") -> list[Path]:
    """Give a figure its head lines and write it as ``.svg`` and ``.png``; the SVG turns dark where its reader is."""
    figure.suptitle(
        f"{title}\n\n" if caption else f"{title}\n", x=0.012, ha="left", color=INK, fontsize=13, fontweight="bold"
    )
    lines = f"{note}\n{caption}" if caption else note
    figure.text(0.012, 0.945 if caption else 0.94, lines, color=PALE, fontsize=9, va="top", linespacing=1.5)
    files = [path.with_suffix(".svg"), path.with_suffix(".png")]
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"Date": None, "Title": title, "Description": f"{note}. {caption}".strip()}
    figure.savefig(files[0], metadata=told)  # no date: the same numbers give the same file
    drawn = files[0].read_text(encoding="utf-8")
    files[0].write_text(drawn.replace("<defs>", f"<style>{_DARK}</style>\n <defs>", 1), encoding="utf-8")
    figure.savefig(files[1], dpi=160)
    return files


def _draw_panel(
    panel: Any, runner: str, phases: Mapping[str, Mapping[str, Timing]], colours: Mapping[str, str], base: str
) -> None:
    """Bars of one runner: a group per metric, a bar per contender."""
    names = [name for name in colours if any(name in phase for phase in phases.values())]
    width = 0.81 / max(3, len(names))
    for group, timings in enumerate(phases.values()):
        for slot, name in enumerate(names):
            if name not in timings:
                continue
            timing = timings[name]
            added, low, high = (100 * (ratio - 1) for ratio in (timing.ratio, timing.low, timing.high))
            x = group + (slot - (len(names) - 1) / 2) * width
            panel.bar(x, added, width * 0.92, color=colours[name], zorder=2)
            panel.errorbar(
                x,
                added,
                yerr=[[added - low], [high - added]],
                color=INK,
                elinewidth=0.9,
                capsize=2.5,
                zorder=3,
            )
            above = added >= 0
            panel.annotate(
                _percent(added),
                (x, high if above else low),
                xytext=(0, 3 if above else -3),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                color=INK,
                fontweight="bold" if name == "fused" else "normal",
            )
    panel.axhline(0, color=INK, linewidth=1, zorder=4)
    panel.margins(y=0.14)
    panel.set_xlim(-0.5, len(phases) - 0.5)
    panel.set_title(runner, loc="left", color=INK, fontsize=11)
    panel.set_xticks(range(len(phases)), list(phases), color=INK)
    panel.tick_params(axis="both", length=0, labelcolor=PALE)
    panel.tick_params(axis="x", labelcolor=INK)
    panel.yaxis.set_major_formatter(lambda value, _: _percent(value) if value else base)
    panel.grid(axis="y", color="#eceef1", zorder=0)
    panel.spines[:].set_visible(False)


def _percent(value: float) -> str:
    rounded = round(value)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else '±'}{abs(rounded)}%"
