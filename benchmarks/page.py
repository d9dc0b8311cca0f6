"""docs/benchmarks.md from the JSON of record: every figure with its date, machine and command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

__all__ = ["write_page"]

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def write_page() -> Path:
    """Write the page and return its path."""
    parts = ["# Measured\n\nWritten by `python -m benchmarks page` from `benchmarks/results/`; do not edit.\n"]
    for name, section in (("layouts", _layouts), ("passes", _passes)):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        parts.append(section(result) + _source(result["environment"]))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts))
    return PAGE


def _source(environment: dict[str, Any]) -> str:
    return (
        f"\n{environment['date']}, {environment['machine']}, torch {environment['torch']}, "
        f"Python {environment['python']}: `{environment['command']}`\n"
    )


def _layouts(result: dict[str, Any]) -> str:
    text = (
        f"## Forms of the fused graph\n\n{result['shape']} shape, {result['layers']} layers, float32, LoRA r="
        f"{result['rank']} on all seven projections, one sequence: prefill of 128 tokens, and one token after 128. "
        f"Every graph is captured with torch.export; ratios are to the base without adapters in the same round, "
        f"medians of {result['rounds']} shuffled rounds with 95% intervals. Each variant has weights of its own.\n"
    )
    for (runner, phase), rows in itertools.groupby(result["ratios"], key=lambda row: (row["runner"], row["phase"])):
        text += f"\n| {runner}, {phase} | ms | × base |\n|---|---|---|\n"
        for row in rows:
            interval = "" if row["variant"] == "base" else f" ({row['low']:.3f}–{row['high']:.3f})"
            text += f"| {row['variant']} | {row['ms']:.2f} | {row['ratio']:.3f}{interval} |\n"
    return text


def _passes(result: dict[str, Any]) -> str:
    text = f"## Time to fuse\n\nLlama of the {result['shape']} shape, best of {result['rounds']}.\n\n"
    text += "| layers | graph nodes | seconds | ms per layer |\n|---|---|---|---|\n"
    for row in result["fuse"]:
        text += f"| {row['layers']} | {row['nodes']} | {row['seconds']:.3f} | {row['ms_per_layer']:.1f} |\n"
    return text
