"""A long search: ``python -m tests.properties.run --count 200000 --seed 1 --record tests/properties/record.json``.

In processes, with a record of what was searched: it is written anew after each chunk, so that a run which is cut short
has said what it did. It stops at the first program that is fused wrongly, prints the smallest such program, which the
functions of `checking` repeat, and exits with 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import hypothesis
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import flora_fx
import flora_fx.passes

from .searching import PARTS, Counterexample, chunks, search

ROOMS = ("graph", "storage", "reporting")
"""Those of flora_fx that every fused graph goes through."""
CHUNKS_A_PROCESS = 20
"""Then a fresh one: Dynamo and hypothesis remember what they have seen."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, required=True, help="graphs, over all parts")
    parser.add_argument("--seed", type=int, required=True, help="of the first chunk of each part; the next adds 1")
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shares", type=_shares, default=PARTS, help="of the parts: quick=0.9,exported=0.1")
    options = parser.parse_args()
    shares: dict[str, float] = options.shares
    found = [chunk for part in shares for chunk in chunks(part, options.count, options.seed, shares)]
    random.Random(options.seed).shuffle(found)  # so that the time that is left can be told
    asked = {"count": options.count, "seed": options.seed, "processes": options.processes, "shares": shares}
    record = Record(options.record, asked)
    failure = run(found, options.processes, record)
    if failure:
        print(failure)
    print(f"{record.tally['graphs']} graphs, {'a failure' if failure else 'none fused wrongly'}: {options.record}")
    return 1 if failure else 0


def _shares(text: str) -> dict[str, float]:
    found = {part: float(share) for part, share in (piece.split("=") for piece in text.split(","))}
    if not found.keys() <= PARTS.keys() or abs(sum(found.values()) - 1) > 1e-9:
        raise argparse.ArgumentTypeError(f"of {', '.join(PARTS)}, and 1 in all")
    return found


def sources() -> str:
    """A hash of what was searched: the fused graph's and the search's own Python files, by name."""
    core, passes, here = (Path(file or "").parent for file in (flora_fx.__file__, flora_fx.passes.__file__, __file__))
    searched = [(root, path) for root in (core, here) for path in sorted(root.glob("*.py"))]
    searched += [(core, path) for room in ROOMS for path in sorted((core / room).glob("*.py"))]
    searched += [(passes, path) for path in sorted(passes.rglob("*.py"))]
    total = hashlib.sha256()
    for root, path in searched:
        name = f"{root.name}/{path.relative_to(root).as_posix()}"
        total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def run(found: list[tuple[str, int, int]], processes: int, record: Record) -> str:
    """Search chunk by chunk; the first counterexample, or nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=None) as progress,
        ProcessPoolExecutor(processes, context, initializer=_prepare, max_tasks_per_child=CHUNKS_A_PROCESS) as pool,
    ):
        task = progress.add_task("graphs", total=sum(count for _, count, _ in found))
        left = iter(found)
        running: set[Future[tuple[Counter[str], str, float]]] = set()
        while True:
            free = 2 * processes - len(running)
            running.update(pool.submit(_search, chunk) for chunk in islice(left, free))
            if not running:
                return ""
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                tally, failure, seconds = future.result()
                record.add(tally, failure, seconds)
                progress.update(task, completed=record.tally["graphs"])
                if failure:
                    pool.shutdown(wait=False, cancel_futures=True)
                    return failure


def _prepare() -> None:
    torch.set_num_threads(1)


def _search(chunk: tuple[str, int, int]) -> tuple[Counter[str], str, float]:
    start = time.process_time()
    try:
        return search(*chunk), "", time.process_time() - start
    except Counterexample as error:
        return Counter(), str(error), time.process_time() - start


class Record:
    """What a run has searched so far, as a file."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path = path
        self.asked = asked
        self.sources = sources()
        self.tally: Counter[str] = Counter()
        self.failures: list[str] = []
        self.cpu_seconds = 0.0
        self.started = datetime.now(UTC)

    def add(self, tally: Counter[str], failure: str, cpu_seconds: float) -> None:
        self.tally += tally
        self.cpu_seconds += cpu_seconds
        self.failures += [failure] if failure else []
        text = json.dumps(self.to_dict(), indent=2)
        partial = self.path.with_suffix(".partial")
        partial.write_text(f"{text}\n", encoding="utf-8")
        partial.replace(self.path)

    def to_dict(self) -> dict[str, Any]:
        now = datetime.now(UTC)
        return {
            "asked": self.asked,
            "command": f"python -m tests.properties.run {' '.join(sys.argv[1:])}",
            "sources": self.sources,
            "graphs": self.tally["graphs"],
            "unrunnable": self.tally["unrunnable"],
            "failures": self.failures,
            "met": {key: self.tally[key] for key in sorted(self.tally) if key not in ("graphs", "unrunnable")},
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round((now - self.started).total_seconds()),
            "cpu_seconds": round(self.cpu_seconds),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "hypothesis": hypothesis.__version__,
            },
        }


if __name__ == "__main__":
    sys.exit(main())
