"""docs/benchmarks.md from the JSON of record: every figure with its date, machine and command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import RECORD
from .sheet import Sheet

__all__ = ["Chapter", "write_page"]

PAGE = RECORD.parent.parent / "docs" / "benchmarks.md"

_HEAD = """# Measured

Written by `python -m benchmarks page` from `benchmarks/results/`; do not edit. Each chapter ends with the command that
repeats it. `make bench` runs the reduced latency suite and the kernel counts anew (under ten minutes on 2 cores).

How to read the tables:

- **× base** is the median of ratios to the base *in the same round*, with a 95% bootstrap interval over generations and
  processes; a shared machine moves milliseconds, not these.
- **× base (genai)**, where it stands instead, is the same to the onnxruntime-genai builder's graph without an adapter.
- **× own base** is the same to the base of the contender's own kind: `base (genai)` for `PEFT (genai)`.
- **left** is the share of PEFT's overhead that is left, (ours − base) / (PEFT − base): 0 is the base, 1 is PEFT, above
  1 is slower than PEFT. It means nothing where PEFT costs nothing. `fused (freezing)` is related to `PEFT (freezing)`
  and `base (freezing)`; under ONNX Runtime there is none, since no exporter's PEFT graph is *the* PEFT.
- **arithmetic floor** is what unmerged adapters cost if nothing but arithmetic cost anything: 1 + adapter bytes / base
  bytes for a token, 1 + adapter FLOPs / base FLOPs for a prompt.
- **nodes** are those of the decode graph as its exporter wrote it; **at most** is what was to be shown.
- **of stream** is the weight-streaming limit (bytes of weights / measured bandwidth) as a fraction of TPOT.
- **FFBA block** and **FFBA shared** are fused forward-backward adapters (`flora_fx.adapters`) instead of the LoRA, each
  of the largest rank with no more parameters than it; what they leave is of the same PEFT LoRA's overhead.
- *live* contenders are the model as transformers and PEFT run it; *captured* ones are graphs of `flora_fx.capture`, and
  **fused** is the captured PEFT graph after `flora_fx.fuse`. *Refused* is a figure whose contender did not compute what
  the float64 reference computes, or did not run compiled.
- **fused (hot swap)** is exported for `load_adapter`; **(general)** is our export to plain operators, without
  GroupQueryAttention.
- Contenders take turns token by token, each with weights of its own: the token before leaves none in a cache.
"""


def setup(result: Mapping[str, Any]) -> str:
    """The sentence about a suite's `Settings`."""
    setup = result["settings"]
    text = (
        f"{setup['shape']} shape, {setup['layers']} layers, {setup['dtype']}, LoRA of rank {setup['rank']} on "
        f"{', '.join(setup['targets'])}, batch {setup['batch']}, on {setup['device']} with {setup['threads']} threads."
    )
    if "bandwidth" in result:
        text += f" Weights stream at {result['bandwidth'] / 1e9:.1f} GB/s at best."
    return text


@dataclass(frozen=True)
class Chapter:
    """One JSON file of record as a chapter of the page.

    Attributes:
        title: its heading.
        text: what it shows.
        sheets: its tables.
        draw: its pictures, written beside the JSON.
        setup: model and settings, in sentences.
    """

    title: str
    text: str
    sheets: Callable[[Mapping[str, Any]], Sequence[Sheet]]
    draw: Callable[[Mapping[str, Any], Path], Sequence[Path]] = lambda result, path: ()
    setup: Callable[[Mapping[str, Any]], str] = setup


def write_page(chapters: Mapping[str, Chapter], *, record: Path = RECORD, page: Path = PAGE) -> Path:
    """Write the page.

    Args:
        chapters: by the name of their JSON file, in order; one that has no file yet is left out.
        record: folder of the JSON files, and of the pictures.
        page: to write.

    Returns:
        the page's path.
    """
    parts = [_HEAD]
    for name, chapter in chapters.items():
        file = record / f"{name}.json"
        if file.exists():
            parts.append(_chapter(chapter, json.loads(file.read_text()), record / name, page.parent))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts))
    return page


def _chapter(chapter: Chapter, result: Mapping[str, Any], path: Path, folder: Path) -> str:
    pictures = [file for file in chapter.draw(result, path) if file.suffix == ".svg"]
    lines = [f"## {chapter.title}", f"{chapter.text} {chapter.setup(result)}"]
    lines += [f"![{chapter.title}]({_relative(picture, folder)})" for picture in pictures]
    lines += [sheet.markdown() for sheet in chapter.sheets(result)]
    lines.append(_source(result["environment"]))
    return "\n\n".join(lines) + "\n"


def _relative(file: Path, folder: Path) -> str:
    return Path("..", file.resolve().relative_to(folder.resolve().parent)).as_posix()


def _source(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {value}" for name, value in environment.items() if name not in ("date", "command", "machine", "gpu")
    )
    machine = environment["machine"] + (f", {environment['gpu']}" if "gpu" in environment else "")
    return f"{environment['date']}, {machine}; {versions}: `{environment['command']}`"
