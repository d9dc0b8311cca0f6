"""What torch.profiler records of one call, as events of the Chrome trace format."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["trace"]


def trace(call: Callable[[], object], device: str, *, memory: bool = False) -> list[dict[str, Any]]:
    """Run a call under the profiler.

    Args:
        call: what to run, once.
        device: ``cpu`` or ``cuda``; kernels of the latter are recorded too.
        memory: also record each allocation and release on the CPU, as events named ``[memory]``.

    Returns:
        the events; each has a ``name``, most have a category (``cat``) and a start (``ts``, microseconds).

    >>> names = [event["name"] for event in trace(lambda: torch.ones(2, 3) @ torch.ones(3, 4), "cpu")]
    >>> names.count("aten::mm")
    1
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, profile_memory=memory) as recorded:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events
