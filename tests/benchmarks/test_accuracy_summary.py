"""What is published of runs: rates chosen by validation, intervals of seeds and of rates, sheets and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import view as accuracy_view
from benchmarks.accuracy.accuracy import measure
from benchmarks.accuracy.data import SPLITS
from benchmarks.accuracy.intervals import Tried, bootstrap, chosen, settled
from benchmarks.accuracy.journal import Journal
from benchmarks.accuracy.methods import FULL, LORA, Contestant
from benchmarks.accuracy.model import Pretraining
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.run import Outcome, Run
from benchmarks.accuracy.summary import summary


def test_rate_is_chosen_by_validation_and_the_test_is_never_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate that is worst on validation is best on the test split; nobody may notice."""
    validation = {1e-3: 10.0, 2e-3: 60.0, 3e-3: 30.0}

    def outcome(pool: Any, runs: Sequence[Run], journal: Journal, progress: Any) -> None:
        for run in runs:
            right = validation[run.rate] + run.seed
            journal.add(run, Outcome(12288, right, 100 - right + (5 if run.method == "block" else 0)))

    monkeypatch.setattr("benchmarks.accuracy.accuracy.Pool.finish", outcome)
    plan = Plan(
        methods=(LORA, "block"),
        tasks=("sort halves",),
        budgets=(2,),
        rates=tuple(validation),
        tuning_seeds=2,
        seeds=5,
        pretraining=Pretraining(steps=1, hidden=128, batch=2),
    )
    result = measure(plan, tmp_path / "runs.jsonl")
    lora, block = result["cells"]
    assert (lora["rate"], lora["at_end"]) == (2e-3, False)
    assert lora["validation"] == [[10, 11], [60, 61], [30, 31]]
    assert lora["test"] == [40, 39, 38, 37, 36]
    assert block["difference"] == {"mean": 5, "low": 5, "high": 5}  # paired: seeds move both alike
    assert result["verdicts"] == [
        {"budget": 2, "best": "block", "difference": block["difference"], "target": 2.1, "reached": True}
    ]
    assert [row["validation"] for row in result["grid"]] == 2 * [10.5, 60.5, 30.5]


def test_of_equal_rates_the_smallest_is_chosen_and_ends_are_told() -> None:
    assert chosen([[0, 0], [50, 50], [40, 60]]) == 1
    assert not Tried([[0], [1], [0]]).at_end
    assert Tried([[0], [1]]).at_end
    assert Tried([[2], [1]]).at_end


def test_interval_is_of_seeds_within_tasks() -> None:
    apart = bootstrap([settled([0.0] * 5), settled([100.0] * 5)])
    assert (apart.mean, apart.low, apart.high) == (50, 50, 50)  # another choice of tasks is not in it
    seeds = settled([0.0, 10.0, 20.0, 30.0, 40.0])
    noisy = bootstrap([seeds])
    assert noisy.mean == 20
    assert 5 < noisy.low < 12 < 28 < noisy.high < 35
    many = bootstrap([seeds] * 16)
    assert noisy.high - noisy.low == pytest.approx(4 * (many.high - many.low), rel=0.1)


def test_each_draw_of_seeds_chooses_its_rates() -> None:
    """By validation: one method's rates are as good as each other there, and 20 points apart on the test split."""
    seeds = 12
    clear = Tried([[10.0] * seeds, [60.0] * seeds], [[5.0] * seeds, [50.0] * seeds])
    even = [float(seed % 2) for seed in range(seeds)]
    torn = Tried([[30 + x for x in even], [31 - x for x in even]], [[40.0] * seeds, [60.0] * seeds])
    found = bootstrap([torn], [clear])
    assert (found.mean, found.low, found.high) == (-10, -10, 10)
    assert bootstrap([clear], [torn]).high == 10
    assert bootstrap([torn]).high == 60
    same = bootstrap([clear], [clear])
    assert (same.mean, same.low, same.high) == (0, 0, 0)

    lora, shared = (Contestant(2, method, 2, 100) for method in (LORA, "shared"))
    tried = {(lora, "t"): clear, (shared, "t"): torn}
    result = summary([lora, shared], ["t"], [1e-3, 1e-2], tried, tried)
    assert result["means"][1]["difference"] == {"mean": -10, "low": -10, "high": 10}
    assert result["cells"][1]["tests"] == torn.test
    assert "which choose their learning rates anew" in accuracy_view.intervals(result)
    once = {pair: settled(one.reported) for pair, one in tried.items()}  # tuning looked at fewer seeds
    result = summary([lora, shared], ["t"], [1e-3, 1e-2], tried, once)
    assert result["means"][1]["difference"] == {"mean": -10, "low": -10, "high": -10}
    assert "tests" not in result["cells"][1]
    assert "at the rates chosen" in accuracy_view.intervals(result)


def test_best_variant_is_chosen_by_validation() -> None:
    entered = [Contestant(2, method, 2, 100) for method in (LORA, "block", "shared")]
    tried = {(one, "t"): Tried([[right]]) for one, right in zip(entered, (50.0, 70.0, 60.0), strict=True)}
    final = {(one, "t"): settled([right, right]) for one, right in zip(entered, (50.0, 51.0, 90.0), strict=True)}
    [verdict] = summary(entered, ["t"], [1e-3], tried, final)["verdicts"]
    assert (verdict["best"], verdict["difference"]["mean"], verdict["reached"]) == ("block", 1, False)


def test_sheets_and_pictures_of_a_method_that_is_not_available(tmp_path: Path) -> None:
    entered = [
        Contestant(0, FULL, 0, 1000),
        Contestant(1, LORA, 1, 40),
        Contestant(1, "cross", 0, 0, "40 parameters are too few"),
        Contestant(1, "block", 3, 36),
    ]
    tasks, competing = ["a", "b"], [one for one in entered if not one.unavailable]
    tried = {(one, task): Tried([[1.0], [2.0], [1.0]]) for one in competing for task in tasks}
    final = {(one, task): settled([10.0 + one.rank, 20.0 + one.rank]) for one in competing for task in tasks}
    settings = {
        "model": "some/model",
        "parameters": 1000,
        "recipe": {"steps": 3, "batch": 4, "device": "cpu"},
        "rates": [1e-3, 2e-3, 4e-3],
        "seeds": 2,
        "tuning_seeds": 1,
        "tasks": {"a": dict.fromkeys(SPLITS, 5), "b": dict.fromkeys(SPLITS, 6)},
    }
    result = {"settings": settings, **summary(entered, tasks, settings["rates"], tried, final)}
    means, by_task, differences, rates, grid = accuracy_view.sheets(result)
    assert means.title == "Test split, at most 40 parameters (4.0%, LoRA of rank 1)"
    assert means.rows == [
        ["full", "", "1000", "15.0 (10.0…20.0)", ""],
        ["LoRA", "1", "40", "16.0 (11.0…21.0)", ""],
        ["cross", "not available"],
        ["block", "3", "36", "18.0 (13.0…23.0)", "+2.0 (+2.0…+2.0)"],
    ]
    assert means.notes[0] == "cross is not available: 40 parameters are too few."
    assert "the target of +2.1 is missed" in means.notes[1]
    assert by_task.rows[1] == ["LoRA", "16.0 ± 7.1", "16.0 ± 7.1"]
    assert differences.rows == [["block", "+2.0 (+2.0…+2.0)", "+2.0 (+2.0…+2.0)"]]
    assert [row[1:] for row in rates.rows] == 3 * [["0.002", "0.002"]]
    assert rates.notes == []
    assert grid.rows[-1] == ["block", "1.0; 0.0 (0.0…0.0)", "2.0; 0.0 (0.0…0.0)", "1.0; 0.0 (0.0…0.0)"]
    assert "The base is `some/model` (1000 parameters); 2 tasks" in accuracy_view.setup(result)
    files = accuracy_view.draw(result, tmp_path / "accuracy")
    assert [file.name for file in files] == [
        "accuracy.svg",
        "accuracy.png",
        "accuracy-tasks.svg",
        "accuracy-tasks.png",
    ]
    assert all(file.stat().st_size for file in files)
