"""The side-by-side measurement as one picture: what each form of the adapter adds to the base's latency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flora_fx.demo.measure import Timing
from flora_fx.errors import require

__all__ = ["draw_latency"]

_COLOURS = {"unmerged": "#c9cdd3", "fused": "#2f7d5b", "merged": "#cfe0c4"}
_INK, _PALE = "#25292e", "#8a929c"


def draw_latency(
    timings: Mapping[str, Mapping[str, Mapping[str, Timing]]], path: Path, *, title: str, note: str
) -> list[Path]:
    """Draw one panel per runner with bars of added latency, in percent of the base, and their 95% intervals.

    Args:
        timings: runner -> phase (``"TTFT"``, ``"TPOT"``) -> contender -> timing. Contenders other than
            ``unmerged``, ``fused`` and ``merged`` are left to the table.
        path: without a suffix; ``.svg`` and ``.png`` are written.
        title: what was measured.
        note: one line below it, for the conditions.

    Returns:
        The two files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "cli")
    figure_module = require("matplotlib.figure", "cli")
    style = {"font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "flora_fx", "svg.fonttype": "path"}
    with matplotlib.rc_context(style):
        # A bare Figure draws without a display and leaves pyplot's global state alone.
        figure = figure_module.Figure(figsize=(9.0, 4.2), facecolor="white", layout="constrained")
        panels = figure.subplots(1, len(timings), sharey=True, squeeze=False)[0]
        for panel, (runner, phases) in zip(panels, timings.items(), strict=True):
            _draw_panel(panel, runner, phases)
        panels[0].set_ylabel("latency added to the base", color=_PALE)
        handles = [
            matplotlib.patches.Patch(facecolor=colour, label=name)
            for name, colour in _COLOURS.items()
            if any(name in phase for phases in timings.values() for phase in phases.values())
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"{title}\n", x=0.012, ha="left", color=_INK, fontsize=13, fontweight="bold")
        figure.text(0.012, 0.895, note, color=_PALE, fontsize=9)
        files = [path.with_suffix(".svg"), path.with_suffix(".png")]
        figure.savefig(files[0], metadata={"Date": None})  # no date: the same numbers give the same file
        figure.savefig(files[1], dpi=160)
    return files


def _draw_panel(panel, runner: str, phases: Mapping[str, Mapping[str, Timing]]) -> None:  # type: ignore[no-untyped-def]
    """Bars of one runner: a group per phase, a bar per contender."""
    names = [name for name in _COLOURS if any(name in phase for phase in phases.values())]
    width = 0.27
    for group, timings in enumerate(phases.values()):
        for slot, name in enumerate(names):
            if name not in timings:
                continue
            timing = timings[name]
            added, low, high = (100 * (ratio - 1) for ratio in (timing.ratio, timing.low, timing.high))
            x = group + (slot - (len(names) - 1) / 2) * width
            panel.bar(x, added, width * 0.92, color=_COLOURS[name], zorder=2)
            panel.errorbar(
                x,
                added,
                yerr=[[added - low], [high - added]],
                color=_INK,
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
                color=_INK,
                fontweight="bold" if name == "fused" else "normal",
            )
    panel.axhline(0, color=_INK, linewidth=1, zorder=4)
    panel.margins(y=0.14)
    panel.set_xlim(-0.5, len(phases) - 0.5)
    panel.set_title(runner, loc="left", color=_INK, fontsize=11)
    panel.set_xticks(range(len(phases)), list(phases), color=_INK)
    panel.tick_params(axis="both", length=0, labelcolor=_PALE)
    panel.tick_params(axis="x", labelcolor=_INK)
    panel.yaxis.set_major_formatter(lambda value, _: _percent(value) if value else "base")
    panel.grid(axis="y", color="#eceef1", zorder=0)
    panel.spines[:].set_visible(False)


def _percent(value: float) -> str:
    rounded = round(value)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else '±'}{abs(rounded)}%"
