"""Time and memory of `fuse` against the number of layers: it must be linear."""

from __future__ import annotations

import time
from typing import Any

import torch

import flora_fx

from .models import adapted_llama, step_inputs

__all__ = ["measure"]


def measure(layers: tuple[int, ...] = (4, 8, 16, 32), shape: str = "tiny", rounds: int = 3) -> dict[str, Any]:
    """Seconds per fuse (the best of `rounds`, each on a fresh model) and per pass, by number of layers."""
    found = []
    for count in layers:
        best: dict[str, Any] = {"seconds": float("inf")}
        for _ in range(rounds):
            with torch.no_grad():
                graph = flora_fx.capture(adapted_llama(shape, count, rank=8), *step_inputs(shape, count, 16, 0))
            start = time.perf_counter()
            fused = flora_fx.fuse(graph)
            seconds = time.perf_counter() - start
            if seconds < best["seconds"]:
                report = flora_fx.report(fused)
                best = {"seconds": seconds, "passes": dict(report.seconds), "nodes": len(graph.graph.nodes)}
        found.append({"layers": count, **best, "ms_per_layer": 1e3 * best["seconds"] / count})
    return {"shape": shape, "rounds": rounds, "fuse": found}


def table(result: dict[str, Any]) -> str:
    """The result for readers."""
    lines = [f"{'layers':>8}{'nodes':>8}{'seconds':>10}{'ms/layer':>10}"]
    lines += [
        f"{row['layers']:>8}{row['nodes']:>8}{row['seconds']:>10.3f}{row['ms_per_layer']:>10.2f}"
        for row in result["fuse"]
    ]
    return "\n".join(lines)
