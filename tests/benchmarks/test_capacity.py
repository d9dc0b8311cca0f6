"""Replicas side by side: each row is of so many, all rows of one export; the hosts follow from what was measured."""

from __future__ import annotations

import pytest

from flora_fx.benchmarks import capacity
from flora_fx.benchmarks.settings import Settings


def test_replicas_of_all_cores_and_of_one_each() -> None:
    labels: list[str] = []

    def progress(label: str) -> capacity.Progress:
        labels.append(label)
        return lambda done, total: None

    settings = Settings("tiny", layers=1, rank=4, threads=2)
    result = capacity.measure(settings, batches=(2,), prompt=5, new=3, seconds=0.5, progress=progress)
    alone, each = result["rows"]
    assert [(row["replicas"], row["threads"], row["batch"]) for row in (alone, each)] == [(1, 2, 2), (2, 1, 2)]
    assert all(0 < row["first"] < row["latency"] < 60 for row in (alone, each))
    assert all(row["requests"] > 0 and row["bytes"] > 2**20 for row in (alone, each))
    assert labels == ["export to ONNX", "replicas"]
    measured, needed = capacity.sheets(result)
    assert [row[:2] for row in measured.rows] == [["1 × 2", "2"], ["2 × 1", "2"]]
    assert measured.rows[0][3] == f"{3 * alone['requests']:.0f}"
    assert needed.rows[1][2:] == [str(capacity.hosts(load, each["requests"])) for load in capacity.LOADS]


def test_hosts_are_busy_for_no_more_than_was_said() -> None:
    for load in capacity.LOADS:
        count = capacity.hosts(load, 9.3)
        assert load / (count * 9.3) <= capacity.UTILISATION < load / (max(count - 1, 0.1) * 9.3)


def test_replicas_that_were_never_busy_together_have_no_rate() -> None:
    with pytest.raises(RuntimeError, match="not busy at the same time"):
        capacity.rate([[(0.0, 1.0)], [(2.0, 3.0)]])
