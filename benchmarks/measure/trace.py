"""What torch.profiler records of one call, as events of the Chrome trace format."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["busy", "trace"]


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


_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def busy(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What of a call a GPU took, from `trace`.

    Returns:
        milliseconds: ``span``, from the start of its first kernel or copy to the end of its last one, and ``work``, the
        sum of all of them. Both are 0 where nothing ran on a GPU.

    >>> busy([{"cat": "kernel", "ts": 10.0, "dur": 2.0}, {"cat": "kernel", "ts": 15.0, "dur": 5.0}, {"name": "other"}])
    {'span': 0.01, 'work': 0.007}
    """
    pieces = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in _ON_DEVICE]
    if not pieces:
        return {"span": 0.0, "work": 0.0}
    first, last = min(start for start, _ in pieces), max(end for _, end in pieces)
    return {"span": (last - first) / 1e3, "work": sum(end - start for start, end in pieces) / 1e3}
