"""Time and peak memory of `flora_fx.fuse` against the number of layers: both must be linear."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

import flora_fx

from ..contenders.models import make_model
from ..contenders.settings import Settings
from ..contenders.step import CachedStep, empty_cache
from ..measure.isolated import Progress
from ..measure.memory import added_bytes, tracked
from ..show.sheet import Sheet

__all__ = ["measure", "sheets"]

PROMPT = 16
"""Tokens of the captured graph; `fuse` does not depend on them."""


def measure(
    settings: Settings,
    *,
    layers: Sequence[int] = (4, 8, 16, 32),
    rounds: int = 3,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Fuse a captured prefill graph of the model at several depths.

    Args:
        settings: model and device; their depth does not matter.
        layers: the depths.
        rounds: fuses per depth, each of a fresh model; the fastest counts.
        progress: called with the depths done and in all.

    Returns:
        ``{"fuse": {"rounds", "rows"}}``. A row has ``layers``, ``nodes`` (of the captured graph), ``seconds``,
        ``passes`` (seconds by pass), ``model_bytes`` and ``peak_bytes``: what was alive at most beyond the model.
    """
    rows = []
    for done, depth in enumerate(layers):
        rows.append({"layers": depth, **_fuse(replace(settings, layers=depth), rounds)})
        progress(done + 1, len(layers))
    return {"fuse": {"rounds": rounds, "rows": rows}}


def _fuse(settings: Settings, rounds: int) -> dict[str, Any]:
    fastest: dict[str, Any] = {"seconds": float("inf")}
    for _ in range(rounds):
        graph = _captured(settings)
        start = time.perf_counter()
        fused = flora_fx.fuse(graph)
        seconds = time.perf_counter() - start
        if seconds < fastest["seconds"]:
            fastest = {"seconds": seconds, "passes": dict(flora_fx.report(fused).seconds)}
        del fused
    with tracked():  # the parameters' old storages are released while the packs are made
        graph = _captured(settings)
    return {
        "nodes": len(graph.graph.nodes),
        **fastest,
        "model_bytes": sum(weight.nbytes for weight in graph.parameters()),
        "peak_bytes": added_bytes(lambda: flora_fx.fuse(graph), settings.device),
    }


@torch.no_grad()
def _captured(settings: Settings) -> fx.GraphModule:
    model = CachedStep(make_model(settings, "peft")).eval()
    tokens = torch.zeros(settings.batch, PROMPT, dtype=torch.int64, device=settings.device)
    position = torch.tensor(0, device=settings.device)
    return flora_fx.capture(model, tokens, position, *empty_cache(settings, PROMPT))


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """One sheet, a row per depth."""
    body = [
        [
            str(row["layers"]),
            str(row["nodes"]),
            f"{row['seconds']:.3f}",
            f"{1e3 * row['seconds'] / row['layers']:.1f}",
            f"{row['model_bytes'] / 2**20:.1f}",
            f"{row['peak_bytes'] / row['model_bytes']:.3f}",
        ]
        for row in result["fuse"]["rows"]
    ]
    header = ["layers", "graph nodes", "seconds", "ms per layer", "model MiB", "peak beyond it"]
    notes = [f"The fastest of {result['fuse']['rounds']}; memory relative to the model's own."]
    return [Sheet("Time and memory of fuse", header, body, notes)]
