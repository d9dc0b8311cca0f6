"""The demo's result, for people."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_fx.errors import require

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["show"]


def show(result: Mapping[str, Any], output: Path, console: Console) -> None:
    """Print what `flora_fx.demo.run` returned.

    Args:
        result: the contents of ``demo.json``.
        output: the directory it lies in.
        console: where to print.
    """
    escape = require("rich.markup", "cli").escape
    console.print(escape(result["report_text"]))
    for phase, error in result["verification"].items():
        console.print(
            f"{phase}: fused against unmerged in float64: max |Δ| {error['max_abs']:.1e}, "
            f"relative {error['max_rel']:.1e}"
        )
    for name, check in result["onnx"].items():
        tokens = "greedy tokens equal" if check["greedy_tokens_equal"] else "greedy tokens DIFFER"
        console.print(f"ONNX {name}: max |Δ| {check['max_abs_error']:.1e} against PyTorch, {tokens}")
    console.print()
    for text in result["texts"]:
        equal = text["onnx"] == text["adapter"]
        line = partial(console.print, highlight=False, no_wrap=True, overflow="ellipsis")
        line(f"[bold]{escape(text['prompt'])}[/] …")
        line(f"  base     {escape(_flat(text['base']))}", style="dim")
        line(f"  adapter  {escape(_flat(text['adapter']))}", style="green")
        line(f"  in ONNX  {'the same' if equal else escape(_flat(text['onnx']))}")
    console.print()
    console.print(_latency_table(result))
    console.print(f"{result['seconds']:.0f} s; pictures, checkpoints, exports and demo.json: {escape(str(output))}")


def _latency_table(result: Mapping[str, Any]) -> Any:
    rich_table = require("rich.table", "cli")
    table = rich_table.Table(
        title=f"Latency beside the base; prompt of {result['model']['prompt_tokens']} tokens, "
        f"{result['environment']['threads']} CPU threads",
        caption=f"Medians of {result['rounds']} shuffled rounds; ratios within a round, with 95% intervals. "
        "PyTorch runs captured graphs op by op; live is the model as transformers and PEFT run it.",
        title_justify="left",
        caption_justify="left",
        box=require("rich.box", "cli").SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("")
    for phase in ("TTFT", "TPOT"):
        table.add_column(f"{phase}, ms", justify="right", no_wrap=True)
        table.add_column("× base", justify="right", no_wrap=True)
    for runner, phases in result["latency"].items():
        table.add_section()
        table.add_row(f"[bold]{runner}[/]")
        for name in phases["TTFT"]:
            cells = (cell for phase in ("TTFT", "TPOT") for cell in _cells(phases[phase][name]))
            table.add_row(f" {name}", *cells, style="green" if name == "fused" else "")
    return table


def _cells(timing: Mapping[str, float]) -> tuple[str, str]:
    ratio, low, high = timing["ratio"], timing["low"], timing["high"]
    interval = "" if low == high == 1 else f" ({low:.2f}–{high:.2f})"
    return f"{timing['milliseconds']:.2f}", f"{ratio:.2f}{interval:<12}"


def _flat(text: str) -> str:
    return text.strip().replace("\n", " ⏎ ")
