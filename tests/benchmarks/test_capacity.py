"""Replicas side by side: each row is of so many, all rows of one export; the hosts follow from what was measured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.contenders.settings import Settings
from benchmarks.generation import capacity


def test_replicas_of_all_cores_and_of_one_each() -> None:
    labels: list[str] = []

    def progress(label: str) -> capacity.Progress:
        labels.append(label)
        return lambda done, total: None

    settings = Settings("tiny", layers=1, rank=4, threads=2)
    result = capacity.measure(settings, batches=(2,), prompt=5, new=3, seconds=0.5, progress=progress)
    alone, each = result["rows"]
    assert [(row["replicas"], row["threads"], row["batch"]) for row in (alone, each)] == [(1, 2, 2), (2, 1, 2)]
    assert all(0 < row["first"] < row["latency"] for row in (alone, each))
    assert all(row["requests"] > 0 and row["bytes"] > 2**20 for row in (alone, each))
    assert labels == ["export to ONNX", "replicas"]
    measured, needed = capacity.sheets(result)
    assert [row[:2] for row in measured.rows] == [["1 × 2", "2"], ["2 × 1", "2"]]
    assert measured.rows[0][3] == f"{3 * alone['requests']:.0f}"
    assert needed.rows[1][2:] == [str(capacity.hosts(load, each["requests"])) for load in capacity.LOADS]


class _Job:
    """Answers at once; ``begun`` is set with the fifth answer."""

    settings = Settings("tiny", threads=1, batch=1)
    new = 2

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.answers = 0

    def decoder(self) -> _Job:
        return self

    def text(self, drawn: torch.Generator) -> torch.Tensor:
        return torch.zeros(1, 3, dtype=torch.int64)

    def stream(self, ids: torch.Tensor, **options: Any) -> Iterator[int]:
        yield from range(self.new)
        self.answers += 1
        if self.answers == 5:
            self.begun.set()


def test_replicas_go_on_until_the_last_one_was_busy_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    job = _Job()

    def beside(function: Any, *args: Any, first: int, progress: Any, **_: Any) -> Any:
        if first:  # the machine lets the second one begin when the first has long done its part
            job.begun.wait()
        try:
            return function(*args, progress)
        finally:
            job.begun.set()

    monkeypatch.setattr(capacity, "isolated", beside)
    found = capacity._busy(job, 2, seconds=0.0)
    assert found["requests"] > 0
    assert job.answers > 7


def test_nobody_waits_for_a_replica_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    job = _Job()

    def beside(function: Any, *args: Any, first: int, progress: Any, **_: Any) -> Any:
        if first:
            job.begun.wait()
            raise RuntimeError("no memory")
        return function(*args, progress)

    monkeypatch.setattr(capacity, "isolated", beside)
    with pytest.raises(RuntimeError, match="no memory"):
        capacity._busy(job, 2, seconds=0.0)


def test_hosts_are_busy_for_no_more_than_was_said() -> None:
    for load in capacity.LOADS:
        count = capacity.hosts(load, 9.3)
        assert load / (count * 9.3) <= capacity.UTILISATION < load / (max(count - 1, 0.1) * 9.3)


def test_replicas_that_were_never_busy_together_have_no_rate() -> None:
    with pytest.raises(RuntimeError, match="not busy at the same time"):
        capacity.rate([[(0.0, 1.0)], [(2.0, 3.0)]])
