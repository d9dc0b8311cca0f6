"""What one host serves, and how many hosts a load takes: replicas of an exported decoder side by side, all busy."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from ..contenders.onnx_exports import write_graphs
from ..contenders.settings import Settings
from ..measure.isolated import Progress, isolated
from ..measure.memory import resident_bytes
from ..show.sheet import Sheet
from .loops import Job

__all__ = ["LOADS", "UTILISATION", "hosts", "measure", "rate", "sheets"]

LOADS = (1, 10, 100, 1000)
"""Requests a second."""
UTILISATION = 0.7
"""Of what a host can do: above it requests that come at random wait for each other."""

Span = tuple[float, float]


def measure(
    settings: Settings,
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    prompt: int = 128,
    new: int = 64,
    seconds: float = 10.0,
    progress: Any = lambda label: lambda done, total: None,
) -> dict[str, Any]:
    """Keep every core of ``settings.threads`` busy, with one replica for all of them and with one for each.

    Args:
        settings: model and device; ``threads`` are the host's cores.
        batches: requests that a replica answers together.
        prompt: length, in tokens.
        new: tokens of an answer.
        seconds: how long each arrangement is measured.
        progress: makes a progress callback from a label.

    Returns:
        ``{"settings", "prompt", "new", "seconds", "rows"}``. A row has ``replicas``, ``threads`` (of each), ``batch``,
        ``requests`` (answered per second, by all), ``latency`` and ``first`` (seconds until the last and the first
        token, medians) and ``bytes`` (resident, of one replica).
    """
    rows = []
    arrangements = [(1, settings.threads)]
    if settings.threads > 1 and settings.device == "cpu":
        arrangements.append((settings.threads, 1))
    with tempfile.TemporaryDirectory() as place:
        found = write_graphs(settings, Path(place), progress("export to ONNX"), names=("fused",))["fused"]
        if isinstance(found, str):
            raise RuntimeError(found)
        tick = progress("replicas")
        for replicas, threads in arrangements:
            for batch in batches:
                job = Job(replace(settings, threads=threads, batch=batch), found, prompt, new, 0)
                rows.append({"replicas": replicas, "threads": threads, "batch": batch, **_busy(job, replicas, seconds)})
                tick(len(rows), len(arrangements) * len(batches))
    setup = asdict(settings) | {"layers": settings.depth}
    return {"settings": setup, "prompt": prompt, "new": new, "seconds": seconds, "rows": rows}


def _busy(job: Job, replicas: int, seconds: float) -> dict[str, Any]:
    unready = multiprocessing.get_context("spawn").Value("i", replicas)

    def of(index: int) -> Any:
        threads = job.settings.threads
        place = {"threads": threads, "first": index * threads}
        try:
            return isolated(_serve, job, seconds, unready, **place, progress=lambda done, total: None)
        except BaseException:
            unready.value = 0  # nobody waits for the one that failed
            raise

    with ThreadPoolExecutor(replicas) as pool:
        found = list(pool.map(of, range(replicas)))
    spans = [replica["spans"] for replica in found]
    return {
        "requests": job.settings.batch * rate(spans),
        "latency": statistics.median(stop - start for replica in spans for start, stop in replica),
        "first": statistics.median(first for replica in found for first in replica["first"]),
        "bytes": max(replica["bytes"] for replica in found),
    }


def _serve(job: Job, seconds: float, unready: Synchronized[int], progress: Progress) -> dict[str, Any]:
    """Answer one request after the other until every replica has done so for so many seconds.

    So all of them are busy together for as long, whenever the machine let each of them begin.
    """
    decoder = job.decoder()
    drawn = torch.Generator().manual_seed(0)

    def answer() -> tuple[float, float, float]:
        start = time.perf_counter()
        stream = decoder.stream(job.text(drawn), max_new_tokens=job.new, eos_token_id=[])
        next(stream)
        first = time.perf_counter()
        for _ in stream:
            pass
        return start, first, time.perf_counter()

    answer()  # the first one is slower
    answered = [answer()]
    until = answered[0][0] + seconds
    ready = False
    while not ready or unready.value > 0:
        answered.append(answer())
        if not ready and answered[-1][2] >= until:
            ready = True
            with unready.get_lock():
                unready.value -= 1
    progress(1, 1)
    return {
        "spans": [(start, stop) for start, _, stop in answered],
        "first": [first - start for start, first, _ in answered],
        "bytes": resident_bytes(),
    }


def rate(replicas: Sequence[Sequence[Span]]) -> float:
    """What several replicas finish per second while all of them are busy.

    Args:
        replicas: when each of their pieces of work began and ended, in seconds, in order.

    The second one begins later and goes on longer: seconds 2 to 6 count, with two pieces and one and a half.

    >>> rate([[(0, 2), (2, 4), (4, 6)], [(2, 5), (5, 7)]])
    0.875
    """
    start = max(spans[0][0] for spans in replicas)
    stop = min(spans[-1][1] for spans in replicas)
    if stop <= start:
        raise RuntimeError("the replicas were not busy at the same time; measure longer")
    shares = (
        max(0.0, min(stop, end) - max(start, begin)) / (end - begin) for spans in replicas for begin, end in spans
    )
    return sum(shares) / (stop - start)


def hosts(load: float, requests: float) -> int:
    """Hosts that a load takes, each of them busy for no more than `UTILISATION`.

    Args:
        load: requests that come per second.
        requests: that one host answers per second.

    >>> hosts(100, requests=8)
    18
    """
    return math.ceil(load / (UTILISATION * requests))


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """What was measured, and what follows from it."""
    rows, new = result["rows"], result["new"]
    measured = [
        [
            f"{row['replicas']} × {row['threads']}",
            str(row["batch"]),
            f"{row['requests']:.2f}",
            f"{row['requests'] * new:.0f}",
            f"{row['first']:.2f}",
            f"{row['latency']:.2f}",
            f"{row['bytes'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    header = ["replicas × threads", "batch", "requests/s", "tokens/s", "first token, s", "last token, s", "MiB each"]
    needed = [
        [f"{row['replicas']} × {row['threads']}", str(row["batch"]), *(f"{hosts(n, row['requests'])}" for n in LOADS)]
        for row in rows
    ]
    request = f"prompt of {result['prompt']}, {new} tokens"
    return [
        Sheet(f"One host with all its {result['settings']['threads']} cores busy: {request}", header, measured),
        Sheet(
            f"Hosts for so many requests a second, busy for at most {UTILISATION:.0%}",
            ["replicas × threads", "batch", *(f"{n}/s" for n in LOADS)],
            needed,
            [f"Computed from the table above: load / ({UTILISATION} × requests/s), rounded up."],
        ),
    ]
