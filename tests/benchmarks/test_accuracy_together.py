"""Searches of several suites together: every task counts alike, whatever its suite and its number of seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import together_view
from benchmarks.accuracy.intervals import bootstrap, settled
from benchmarks.accuracy.together import together
from benchmarks.commands import main
from benchmarks.show.page import write_page
from benchmarks.suites import chapters


def _search(suite: str, ours: str, theirs: str, tests: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Of the record of a search what matters; tests by method and task."""
    cells = [
        {"budget": budget, "method": method, "task": task, "test": values}
        for budget in (2, 8)
        for method, by_task in tests.items()
        for task, values in by_task.items()
    ]
    tasks = {task: {} for by_task in tests.values() for task in by_task}
    seeds = len(next(iter(next(iter(tests.values())).values())))
    verdicts = [{"budget": budget, "chosen": {"FFBA": ours, "LoRA": theirs}} for budget in (2, 8)]
    settings = {"suite": suite, "tasks": tasks, "seeds": seeds, "tuning_seeds": 1}
    return {"choice": {}, "report": {"settings": settings, "cells": cells}, "verdicts": verdicts}


SEQUENCES = _search(
    "sequence",
    "shared, tanh",
    "LoRA, MLP",
    {
        "LoRA": {"sort": [10.0, 20.0]},
        "LoRA, MLP": {"sort": [20.0, 20.0]},
        "shared": {"sort": [14.0, 24.0]},
        "shared, tanh": {"sort": [30.0, 34.0]},
    },
)
TEXTS = _search(
    "text",
    "shared",
    "LoRA",
    {
        "LoRA": {"kind": [50.0] * 4, "type": [60.0, 61.0, 62.0, 63.0]},
        "shared": {"kind": [51.0] * 4, "type": [60.0, 63.0, 62.0, 65.0]},
    },
)


def test_every_task_counts_alike() -> None:
    result = together({"one": SEQUENCES, "other": TEXTS})
    assert [verdict["budget"] for verdict in result["verdicts"]] == [2, 8]
    verdict = result["verdicts"][0]
    assert verdict["difference"]["mean"] == pytest.approx((12 + 1 + 1) / 3)
    assert verdict["to_plain"]["mean"] == pytest.approx((17 + 1 + 1) / 3)
    assert verdict["plain"]["mean"] == pytest.approx((4 + 1 + 1) / 3)
    assert verdict["difference"]["low"] < verdict["difference"]["mean"] < verdict["difference"]["high"]
    assert verdict["over_tasks"]["low"] < verdict["difference"]["low"]
    assert verdict["reached"]
    [text] = together_view.sheets(result)
    assert text.rows[0][0] == "2"
    assert text.rows[0][1].startswith("+4.7 (+3.8…+5.5)")
    assert "on sequences shared, tanh and LoRA, MLP; on texts shared and LoRA" in text.notes[0]
    assert "is reached" in text.notes[0]


@pytest.mark.parametrize(("shared", "mean"), [([51.0, 51.0], 1.0), ([30.0, 80.0], 5.0)], ids=["mean", "interval"])
def test_a_target_is_missed_by_the_mean_or_by_the_interval(shared: list[float], mean: float) -> None:
    one = _search("text", "shared", "LoRA", {"LoRA": {"kind": [50.0, 50.0]}, "shared": {"kind": shared}})
    found = together({"one": one, "other": one})["verdicts"][0]
    assert found["difference"]["mean"] == mean
    assert not found["reached"]


def test_tasks_may_have_different_numbers_of_seeds() -> None:
    found = bootstrap([settled(values) for values in ([1.0], [3.0, 3.0], [5.0, 5.0, 5.0])])
    assert (found.mean, found.low, found.high) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("searches", "why"),
    [
        ({"one": SEQUENCES}, "two searches or more go together; there is one"),
        ({"one": SEQUENCES, "other": {"cells": []}}, "other is no search: python -m benchmarks accuracy --search"),
        ({"one": SEQUENCES, "other": TEXTS | {"verdicts": []}}, "one, other have no budget in common"),
    ],
)
def test_what_does_not_go_together_is_refused(searches: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        together(searches)


def test_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "results"
    record.mkdir()
    command = ["accuracy", "--together", "accuracy-search", "accuracy-text-search", "--output", str(record)]
    with pytest.raises(SystemExit, match=r"there is no record .*accuracy-search\.json"):
        main([*command, "--name", "accuracy-both"])
    for name, search in (("accuracy-search", SEQUENCES), ("accuracy-text-search", TEXTS)):
        (record / f"{name}.json").write_text(json.dumps(search))
    main([*command, "--name", "accuracy-both"])
    assert "mean over the tasks of both" in capsys.readouterr().out
    both = tmp_path / "both"
    both.mkdir()
    (record / "accuracy-both.json").rename(both / "accuracy-both.json")
    page = write_page(chapters(both), record=both, page=tmp_path / "docs" / "benchmarks.md").read_text()
    assert "## Accuracy at equal budgets: both" in page
    assert "| 2 | +4.7 (" in page
    assert "sequence: sort, 2 seeds, 1 of them for tuning; of text: kind, type, 4 seeds, 1 of them for tuning" in page
