"""Whole generations from an exported directory, tokens chosen and all.

Three things: our decoder's loop beside that of onnxruntime-genai, on one directory and in turns at every token; what of
a token's time is our Python; and what it takes to swap the adapter, with generations in between.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..contenders.onnx_exports import write_graphs
from ..contenders.settings import Settings
from ..latency.view import cell
from ..measure.isolated import Progress, isolated
from ..show.sheet import Sheet
from .loops import LOOPS, Job, loops, python, related
from .swaps import SWAPPED, measure_swaps

__all__ = ["measure", "sheets"]


def measure(
    settings: Settings,
    *,
    prompt: int = 128,
    new: int = 32,
    rounds: int = 40,
    processes: int = 8,
    swaps: int = 100,
    progress: Any = lambda label: lambda done, total: None,
) -> dict[str, Any]:
    """Measure the fused export, and the swaps of one that is made for them.

    Args:
        settings: model and device.
        prompt: length, in tokens.
        new: tokens after the first one.
        rounds: generations by each loop, over the processes.
        processes: how many times everything is loaded anew, in a process of its own.
        swaps: of the adapter.
        progress: makes a progress callback from a label.

    Returns:
        ``{"settings", "loops", "python", "swaps"}`` and more; see `loops`, `python`, `swap`. A part that failed has
        ``refused`` instead.
    """
    result: dict[str, Any] = {
        "settings": asdict(settings) | {"layers": settings.depth},
        "prompt": prompt,
        "new": new,
        "rounds": rounds,
        "processes": processes,
    }
    with tempfile.TemporaryDirectory() as place:
        names = ("fused", "fused (hot swap)")
        graphs = write_graphs(settings, Path(place), progress("export to ONNX"), names=names)

        def part(name: str, graph: str, work: Callable[[Job, Progress], dict[str, Any]], passes: int) -> None:
            found = graphs[graph]
            try:
                if isinstance(found, str):
                    raise RuntimeError(found)
                result[name] = work(Job(settings, found, prompt, new, passes), progress(name))
            except RuntimeError as error:
                result[name] = {"refused": str(error)}

        def in_turns(job: Job, tick: Progress) -> dict[str, Any]:
            def of_all(index: int) -> Progress:
                return lambda done, total: tick(index * total + done, processes * total)

            threads = settings.threads
            return related([isolated(loops, job, i, threads=threads, progress=of_all(i)) for i in range(processes)])

        part("loops", "fused", in_turns, max(1, rounds // processes))
        part("python", "fused", lambda job, tick: isolated(python, job, threads=settings.threads, progress=tick), 8)
        part("swaps", "fused (hot swap)", lambda job, tick: measure_swaps(job, Path(place, "adapters"), swaps, tick), 1)
    return result


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """A sheet per part."""
    parts = {"loops": _loops_sheet, "python": _python_sheet, "swaps": _swaps_sheet}
    return [make(result, result[name]) for name, make in parts.items()]


def _sheet(title: str, header: Sequence[str], part: Mapping[str, Any], body: Callable[[], Any]) -> Sheet:
    if "refused" in part:
        return Sheet(title, header, [["", "refused"]], [f"Refused: {part['refused'].strip().splitlines()[-1]}."])
    rows, notes = body()
    return Sheet(title, header, rows, notes)


def _loops_sheet(result: Mapping[str, Any], part: Mapping[str, Any]) -> Sheet:
    reference = next(iter(LOOPS))

    def body() -> tuple[list[list[str]], list[str]]:
        rows = []
        for row in part["rows"]:
            cells = [row["variant"]]
            for metric in ("ttft", "tpot"):
                cells += [f"{row[metric]['milliseconds']:.2f}", cell(row[metric])]
            rows.append(cells)
        return rows, [f"Both chose the same tokens in {part['equal']} of {part['generations']} generations."]

    title = (
        f"Greedy generation from one directory, prompt of {result['prompt']}, {result['new']} tokens after the first"
    )
    header = ["", "TTFT, ms", f"× {reference}", "TPOT, ms", f"× {reference}"]
    return _sheet(title, header, part, body)


def _python_sheet(result: Mapping[str, Any], part: Mapping[str, Any]) -> Sheet:
    def body() -> tuple[list[list[str]], list[str]]:
        rows = [
            [name, f"{t['step']:.3f}", f"{t['run']:.3f}", f"{1e3 * t['rest']:.0f}", f"{t['rest'] / t['step']:.1%}"]
            for name, t in part.items()
        ]
        return rows, []

    header = ["", "token, ms", "in ONNX Runtime, ms", "in Python, µs", "share"]
    return _sheet("What of a token is our Python", header, part, body)


def _swaps_sheet(result: Mapping[str, Any], part: Mapping[str, Any]) -> Sheet:
    def body() -> tuple[list[list[str]], list[str]]:
        cells = [
            str(part["count"]),
            f"{part['milliseconds']:.2f} ({part['low']:.2f}–{part['high']:.2f})",
            str(part["right"]),
            f"{part['before'] / 2**20:.1f}",
            f"{part['after'] / 2**20:.1f}",
        ]
        return [["from a directory", *cells]], [f"{SWAPPED} tokens are generated after each; 95% lie in the brackets."]

    header = ["", "swaps", "ms", "tokens as PyTorch's", "MiB before", "MiB after"]
    return _sheet("Swaps of the adapter", header, part, body)
