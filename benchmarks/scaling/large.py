"""What `flora_fx.fuse` takes on a model that this machine could not hold: a graph on the meta device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import fx, nn

import flora_fx

from ..contenders.models import outline
from ..contenders.settings import Settings
from ..measure.isolated import Progress
from ..show.sheet import Sheet
from .fusing import PROMPT

__all__ = ["measure", "sheets"]


def measure(settings: Settings, *, rounds: int = 3, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Capture a model without memory, and fuse it.

    Args:
        settings: shape, depth, dtype and adapter; the device does not matter.
        rounds: fuses of the graph.
        progress: called with the steps done and in all.

    Returns:
        ``{"settings", "large"}``; the latter has ``parameters`` (with the adapters'), ``capture_seconds``, ``seconds``
        (of each fuse), ``passes`` (seconds by pass, of the fastest), ``adapters``, ``declined``, and ``nodes`` and
        ``gemms``, before and after.
    """
    model = outline(settings, "peft")
    start = time.perf_counter()
    graph = _captured(model, settings)
    capture = time.perf_counter() - start
    progress(1, 1 + rounds)
    seconds, reports = [], []
    for done in range(rounds):
        start = time.perf_counter()
        fused = flora_fx.fuse(graph)
        seconds.append(time.perf_counter() - start)
        reports.append(flora_fx.report(fused))
        progress(2 + done, 1 + rounds)
    report = reports[seconds.index(min(seconds))]
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "capture_seconds": capture,
        "seconds": seconds,
        "passes": dict(report.seconds),
        "adapters": len(report.fused),
        "declined": len(report.declines),
        "nodes": [len(graph.graph.nodes), len(fused.graph.nodes)],
        "gemms": [report.ops_before["gemm"], report.ops_after["gemm"]],
    }
    return {"settings": asdict(settings) | {"layers": settings.depth, "device": "meta"}, "large": found}


@torch.no_grad()
def _captured(model: nn.Module, settings: Settings) -> fx.GraphModule:
    tokens = torch.zeros(settings.batch, PROMPT, dtype=torch.int64, device="meta")
    return flora_fx.capture(model, input_ids=tokens, use_cache=False)


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """One sheet of one row, and the time by pass."""
    found = result["large"]
    before, after = found["gemms"]
    row = [
        result["settings"]["shape"],
        str(result["settings"]["layers"]),
        f"{found['parameters'] / 1e9:.1f}",
        str(found["adapters"]),
        str(found["declined"]),
        f"{before} → {after}",
        f"{found['nodes'][0]} → {found['nodes'][1]}",
        f"{found['capture_seconds']:.1f}",
        f"{min(found['seconds']):.2f}",
        f"{max(found['seconds']):.2f}",
    ]
    header = ["shape", "layers", "10⁹ parameters", "adapters", "declined", "GEMMs", "nodes"]
    header += ["`capture`, s", "`fuse`, s", "slowest of " + str(len(found["seconds"]))]
    passes = sorted(found["passes"].items(), key=lambda item: -item[1])
    return [
        Sheet("A graph without memory", header, [row]),
        Sheet("Of the fastest `fuse`", ["pass", "seconds"], [[name, f"{seconds:.2f}"] for name, seconds in passes]),
    ]
