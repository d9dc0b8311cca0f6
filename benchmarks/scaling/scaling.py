"""How the cost of an adapter grows: with its rank, with the batch, with the depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flora_fx.measuring.bars import INK, PALE, STYLE, require_figures, write

from ..contenders.settings import Settings
from ..latency.latency import measure as measure_latency
from ..latency.view import COLOURS, cell
from ..show.sheet import Sheet

__all__ = ["AXES", "draw", "measure", "sheets"]

AXES: dict[str, tuple[int, ...]] = {
    "rank": (8, 16, 32, 64, 128, 256, 512),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "layers": (2, 4, 8, 16),
}
"""What is varied, one at a time."""

SHOWN = ("base", "merged", "PEFT", "fused")


def measure(
    settings: Settings,
    *,
    runner: str = "eager",
    axes: Mapping[str, Sequence[int]] = AXES,
    prompt: int = 128,
    new: int = 16,
    rounds: int = 6,
    processes: int = 1,
    progress: Any = lambda label: lambda done, total: None,
) -> dict[str, Any]:
    """TPOT of base, PEFT, merged and fused, with one setting varied at a time.

    Args:
        settings: what the others stay at.
        runner: see `benchmarks.latency.measure`.
        axes: values by setting.
        prompt: tokens before the first measured one.
        new: tokens that are measured, per generation.
        rounds: generations.
        processes: as in `benchmarks.latency.measure`.
        progress: makes a progress callback from a label.

    Returns:
        ``{"settings", "axes": {axis: [{"value", "rows"}]}}`` with rows as of the latency suite.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for axis, values in axes.items():
        for value in values:
            tick = progress(f"{axis} {value}")
            part = measure_latency(
                replace(settings, **{axis: value}),  # type: ignore[arg-type]
                runners=(runner,),
                prompts=(prompt,),
                new=new,
                rounds=rounds,
                processes=processes,
                contenders=SHOWN,
                progress=lambda label, tick=tick: tick,
            )
            found.setdefault(axis, []).append({"value": value, "rows": part["rows"]})
    setup = asdict(settings) | {"layers": settings.depth}
    return {"settings": setup, "runner": runner, "prompt": prompt, "new": new, "rounds": rounds, "axes": found}


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """One sheet per axis: TPOT relative to the base."""
    return [_sheet(axis, points, result) for axis, points in result["axes"].items()]


def _sheet(axis: str, points: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Sheet:
    body = []
    for point in points:
        rows = {row["variant"]: row for row in point["rows"]}
        if "tpot" not in rows.get("base", {}):
            body.append([str(point["value"]), "refused"])
            continue
        cells = [str(point["value"]), f"{rows['base']['tpot']['milliseconds']:.2f}"]
        body.append(cells + [cell(rows[name]["tpot"]) if "tpot" in rows[name] else "refused" for name in SHOWN[1:]])
    return Sheet(f"TPOT against {axis}, {result['runner']}", [axis, "base, ms", *SHOWN[1:]], body)


def draw(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Lines of TPOT relative to the base, a panel per axis, with 95% bands.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib, figures = require_figures()
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(11.0, 4.2), facecolor="white", layout="constrained")
        panels = figure.subplots(1, len(result["axes"]), sharey=True, squeeze=False)[0]
        for panel, (axis, points) in zip(panels, result["axes"].items(), strict=True):
            _draw_axis(panel, axis, points)
        panels[0].set_ylabel("TPOT × base", color=PALE)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        setup = result["settings"]
        note = (
            f"{setup['shape']} shape, {setup['layers']} layers, {setup['dtype']}, rank {setup['rank']}, batch "
            f"{setup['batch']}, {setup['device']}, {result['runner']}, after a prompt of {result['prompt']}; "
            f"medians of {result['rounds']} × {result['new']} paired tokens"
        )
        return write(figure, path, title="How the cost of a LoRA grows", note=note, caption=_slower(result))


def _slower(result: Mapping[str, Any]) -> str:
    """The points at which the fused graph takes longer than PEFT, as a sentence; "" where there are none."""
    found = []
    for axis, points in result["axes"].items():
        tpot = [{row["variant"]: row["tpot"]["ratio"] for row in point["rows"] if "tpot" in row} for point in points]
        values = [
            str(point["value"])
            for point, seen in zip(points, tpot, strict=True)
            if {"fused", "PEFT"} <= seen.keys() and seen["fused"] > seen["PEFT"]
        ]
        if values:
            found.append(f"{axis} {', '.join(values)}")
    return f"Slower than PEFT, {result['runner']}: {'; '.join(found)}." if found else ""


def _draw_axis(panel: Any, axis: str, points: Sequence[Mapping[str, Any]]) -> None:
    for name in SHOWN[1:]:
        seen = [
            (point["value"], row["tpot"])
            for point in points
            for row in point["rows"]
            if row["variant"] == name and "tpot" in row
        ]
        values = [value for value, _ in seen]
        low, middle, high = ([timing[key] for _, timing in seen] for key in ("low", "ratio", "high"))
        panel.plot(values, middle, color=COLOURS[name], label=name, linewidth=2, marker="o", markersize=4, zorder=3)
        panel.fill_between(values, low, high, color=COLOURS[name], alpha=0.25, linewidth=0)
    panel.axhline(1, color=INK, linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_xticks([point["value"] for point in points], [str(point["value"]) for point in points])
    panel.minorticks_off()
    panel.set_title(axis, loc="left", color=INK, fontsize=11)
    panel.tick_params(axis="both", length=0, labelcolor=PALE)
    panel.grid(axis="y", color="#eceef1", zorder=0)
    panel.spines[:].set_visible(False)
