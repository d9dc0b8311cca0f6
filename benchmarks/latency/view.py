"""The latency suite's result for readers: a sheet per runner and prompt, and bars."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flora_fx.measuring.bars import draw_bars
from flora_fx.measuring.method import Timing

from ..contenders import ffba
from ..show.sheet import Sheet

__all__ = ["COLOURS", "cell", "draw", "sheets", "slower"]

Row = Mapping[str, Any]

METRICS = {"ttft": "TTFT", "tpot": "TPOT", "total": "total"}

COLOURS = {
    "base": "#e3d8bd",
    "PEFT (eager)": "#dfe2e6",
    "PEFT": "#c9cdd3",
    "PEFT (freezing)": "#aeb4bc",
    "PEFT (transformers)": "#cdb7d6",
    "PEFT (transformers, ort_fusions)": "#a389b3",
    "PEFT (genai)": "#8f97a1",
    "fused": "#2f7d5b",
    "fused (hot swap)": "#8cc4a8",
    "fused (freezing)": "#5aa583",
    "fused (flora backend)": "#1b5a40",
    "FFBA block (fused)": "#3c6fb0",
    "FFBA block (flora backend)": "#274a78",
    "FFBA shared (fused)": "#7fa6d6",
    "FFBA shared (flora backend)": "#5b82b5",
    "merged": "#cfe0c4",
}


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """One sheet per runner and prompt length, and on a GPU one of what it worked."""
    found = []
    for (runner, prompt), rows in _groups(result["rows"]):
        found.append(_sheet(runner, prompt, rows, result))
        if any("device" in row.get("tpot", {}) for row in rows):
            found.append(_device_sheet(runner, prompt, rows, _reference(result)))
    return found


def _device_sheet(runner: str, prompt: int, rows: list[Row], reference: str) -> Sheet:
    """Sums of the times of all kernels and copies of one call."""
    works = {
        row["variant"]: [row[metric]["device"]["work"] for metric in ("ttft", "tpot")]
        for row in rows
        if "device" in row.get("tpot", {})
    }
    base = works.get(reference)
    body = [
        [
            name,
            *itertools.chain(
                *((f"{w:.3f}", f"{w / b:.3f}" if b else "") for w, b in zip(work, base or [0, 0], strict=True))
            ),
        ]
        for name, work in works.items()
    ]
    header = ["", "prompt, ms", f"× {reference}", "one token, ms", f"× {reference}"]
    note = "A kernel that is launched before the one ahead of it has ended waits in its own time."
    return Sheet(f"{runner}, prompt of {prompt}: all kernels of a call, one profile each", header, body, [note])


def _groups(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, int], list[Row]]]:
    for key, group in itertools.groupby(rows, key=lambda row: (row["runner"], row["prompt"])):
        yield key, list(group)


def _sheet(runner: str, prompt: int, rows: list[Row], result: Mapping[str, Any]) -> Sheet:
    header = [""]
    for metric in METRICS.values():
        header += [f"{metric}, ms", f"× {_reference(result)}", "× own base", "left"]
    header.append("of stream")
    body = [_cells(row) for row in rows]
    floors: Row = next((row for row in rows if row.get("ttft", {}).get("floor")), {})
    if floors:
        body.append(["arithmetic floor", *itertools.chain(*(_floor(floors[metric]) for metric in METRICS)), ""])
    if any("nodes" in row for row in rows):
        header.append("nodes")
        for row, cells in zip(rows, body, strict=False):
            cells += [""] * (len(header) - 1 - len(cells)) + [str(row.get("nodes", ""))]
    notes = [f"{row['variant']} refused: {_last_line(row['refused'])}." for row in rows if "refused" in row]
    notes += [f"{row['variant']} {row['note']}." for row in rows if "note" in row]
    notes += ffba.note(rows)
    title = f"{runner}, prompt of {prompt}, {result['new']} new tokens"
    return Sheet(title, header, body, notes)


def _reference(result: Mapping[str, Any]) -> str:
    """What ratios are taken to."""
    return str(result.get("reference", "base"))


def _cells(row: Row) -> list[str]:
    if "refused" in row:
        return [row["variant"], "refused"]
    cells = [row["variant"]]
    for metric in METRICS:
        timing = row[metric]
        left = timing.get("left")
        own = f"{timing['own']:.3f}" if "own" in timing else ""
        cells += [f"{timing['milliseconds']:.2f}", cell(timing), own, "" if left is None else f"{left:.2f}"]
    return [*cells, f"{row['tpot']['of_streaming_limit']:.0%}"]


def cell(timing: Mapping[str, float]) -> str:
    """A ratio with its interval.

    >>> cell({"ratio": 1.0443, "low": 1.0412, "high": 1.0501})
    '1.044 (1.041–1.050)'
    """
    low, high = timing["low"], timing["high"]
    return f"{timing['ratio']:.3f}" + ("" if low == high == 1 else f" ({low:.3f}–{high:.3f})")


def _floor(timing: Mapping[str, float]) -> list[str]:
    return ["", f"{timing['floor']:.3f}", "", ""]


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].rstrip(".")


def draw(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Bars of what each form adds to the base: a picture per prompt length, a panel per runner.

    Args:
        result: of `benchmarks.latency.measure`.
        path: without a suffix; the prompt length is added to it.

    Returns:
        an SVG and a PNG file per prompt length.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    setup = result["settings"]
    files = []
    for prompt in dict.fromkeys(row["prompt"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["prompt"] == prompt]
        panels = _panels(rows)
        note = (
            f"{setup['shape']} shape, {setup['layers']} layers, {setup['dtype']}, rank {setup['rank']} on "
            f"{len(setup['targets'])} projections, batch {setup['batch']}, {setup['device']}, prompt of {prompt}; "
            f"medians of {result['rounds']} paired generations, 95% intervals"
        )
        also = ", and an FFBA adapter of no more parameters" if ffba.note(rows) else ""
        reference = _reference(result)
        whom = "the base under the same runner" if reference == "base" else reference
        title = f"What a LoRA costs{also}, beside {whom}"
        colours = {name: colour for name, colour in COLOURS.items() if name != reference}
        if panels:
            place = path.with_name(f"{path.name}-{prompt}")
            files += draw_bars(panels, colours, place, title=title, note=note, base=reference, caption=slower(panels))
    return files


def slower(panels: Mapping[str, Mapping[str, Mapping[str, Timing]]]) -> str:
    """Where a form of ours takes longer than the fastest PEFT under the same runner, as a sentence; "" where none does.

    Args:
        panels: as `draw_bars` takes them.

    >>> timings = {"PEFT": Timing(1.1, 1.1, 1.0, 1.2), "fused": Timing(1.2, 1.2, 1.1, 1.3)}
    >>> slower({"eager": {"TPOT": timings, "TTFT": {"PEFT": Timing(1, 1, 1, 1)}}})
    'Slower than the fastest PEFT: fused under eager (TPOT).'
    """
    found = []
    for runner, metrics in panels.items():
        for ours in [name for name in COLOURS if name.startswith("fused")]:
            where = [metric for metric, timings in metrics.items() if _slower(ours, timings)]
            if where:
                found.append(f"{ours} under {runner} ({', '.join(where)})")
    return f"Slower than the fastest PEFT: {'; '.join(found)}." if found else ""


def _slower(ours: str, timings: Mapping[str, Timing]) -> bool:
    """Beside PEFT with constant weights where ours are constant, else beside all others."""
    kind = "(freezing)" in ours
    peers = [t.ratio for name, t in timings.items() if name.startswith("PEFT") and ("(freezing)" in name) is kind]
    return ours in timings and bool(peers) and timings[ours].ratio > min(peers)


def _panels(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, Timing]]]:
    panels: dict[str, dict[str, dict[str, Timing]]] = {}
    for row in rows:
        for metric in ("ttft", "tpot"):
            if "refused" not in row:
                timing = {key: row[metric][key] for key in ("milliseconds", "ratio", "low", "high")}
                panels.setdefault(row["runner"], {}).setdefault(METRICS[metric], {})[row["variant"]] = Timing(**timing)
    return panels
