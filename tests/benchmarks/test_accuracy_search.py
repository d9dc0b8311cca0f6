"""A search chooses on one half of the tasks and reports on the other; seeds are added by how wide intervals are."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import search_view
from benchmarks.accuracy.accuracy import measure
from benchmarks.accuracy.intervals import bootstrap, settled
from benchmarks.accuracy.methods import FULL, LORA, METHODS, VARIANTS, Contestant, contestants, family
from benchmarks.accuracy.model import Pretraining
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.registered import PLAIN, REGISTERED, rule
from benchmarks.accuracy.run import Outcome, Run
from benchmarks.accuracy.search import search
from benchmarks.accuracy.sequence import SEQUENCE
from benchmarks.accuracy.summary import widest
from benchmarks.accuracy.text.suite import TEXT
from benchmarks.commands import main
from benchmarks.show.page import write_page
from benchmarks.suites import chapters

PLAN = Plan(
    methods=(LORA, "shared"),
    tasks=("sort halves",),
    budgets=(2,),
    rates=(1e-3, 3e-3),
    seeds=4,
    tuning_seeds=2,
    pretraining=Pretraining(steps=1, batch=2),
    workers=1,
)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Run], tuple[float, float]]], list[Run]]:
    """Nothing is trained: a function says what a run gets right on validation and test; its runs are listed."""

    def tell(right: Callable[[Run], tuple[float, float]]) -> list[Run]:
        asked: list[Run] = []
        parameters: dict[tuple[str, int], int] = {}

        def counted(model: Any, methods: Any, budgets: Any) -> Any:
            found = contestants(model, methods, budgets)
            parameters.update({(one.method, one.rank): one.parameters for one in found})
            return found

        def finish(pool: Any, runs: Any, journal: Any, progress: Any) -> None:
            for run in dict.fromkeys(runs):
                if run not in journal:
                    asked.append(run)
                    journal.add(run, Outcome(parameters[run.method, run.rank], *right(run), 1.0))

        monkeypatch.setattr("benchmarks.accuracy.accuracy.contestants", counted)
        monkeypatch.setattr("benchmarks.accuracy.accuracy.Pool.finish", finish)
        return asked

    return tell


# --- what is registered -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [SEQUENCE, TEXT], ids=lambda suite: suite.name)
def test_halves_are_of_all_tasks_and_share_none(suite: Any) -> None:
    assert sorted((*suite.choice, *suite.report)) == sorted(suite.tasks)
    assert not set(suite.choice) & set(suite.report)
    assert abs(len(suite.choice) - len(suite.report)) <= 1


def test_both_families_have_the_same_freedom() -> None:
    assert set(REGISTERED) <= {*METHODS, *VARIANTS}
    assert len(set(REGISTERED)) == len(REGISTERED)
    varied = {of: {m.partition(", ")[2] for m in REGISTERED if family(m) == of} for of in (LORA, "FFBA")}
    assert varied["FFBA"] - varied[LORA] == {"silu", "tanh"}  # a LoRA has no activation, and nothing to cross to
    assert varied[LORA] <= varied["FFBA"]
    assert "chosen" in rule()
    assert rule().startswith("A suite's tasks are two halves")


# --- the search -------------------------------------------------------------------------------------------


def _right(run: Run) -> tuple[float, float]:
    """On the first half "shared, tanh" and "LoRA, MLP" do best by validation; by the tests others would."""
    known = run.task in SEQUENCE.choice
    validation = {"shared, tanh": 60.0, "shared and cross": 59.0, "LoRA, MLP": 55.0, LORA: 50.0, "shared": 54.0}
    test = {"shared, tanh": 62.0, "LoRA, MLP": 58.5, LORA: 50.0, "shared": 90.0}
    better = 5.0 if run.rate > 2e-3 else 0.0
    if known:
        return validation.get(run.method, 40.0) + better + run.seed, 100.0 if run.method == "LoRA, dropout" else 0.0
    return 30.0 + better, test[run.method] + better + run.seed


def test_what_is_chosen_on_one_half_is_reported_on_the_other(told: Any, tmp_path: Path) -> None:
    asked = told(_right)
    result = search(replace(PLAN, tasks=(), methods=SEQUENCE.methods), tmp_path / "runs.jsonl")
    assert {run.method for run in asked if run.task in SEQUENCE.choice} == set(REGISTERED)
    assert {run.seed for run in asked if run.task in SEQUENCE.choice} == {0, 1}
    reported = Counter((run.method, run.rate) for run in asked if run.task in SEQUENCE.report)
    assert reported == dict.fromkeys(itertools.product((*PLAIN, "shared, tanh", "LoRA, MLP"), PLAN.rates), 4 * 4)
    assert list(result["choice"]["settings"]["tasks"]) == list(SEQUENCE.choice)
    assert list(result["report"]["settings"]["tasks"]) == list(SEQUENCE.report)
    [verdict] = result["verdicts"]
    assert verdict["chosen"] == {LORA: "LoRA, MLP", "FFBA": "shared, tanh"}
    assert verdict["validation"] == {LORA: 60.5, "FFBA": 65.5}
    assert verdict["difference"] == {"mean": 3.5, "low": 3.5, "high": 3.5}
    assert verdict["over_tasks"] == verdict["difference"]  # which is the same on every task
    assert verdict["to_plain"] == {"mean": 12.0, "low": 12.0, "high": 12.0}
    assert verdict["reached"]

    verdicts, tried, means, *_ = search_view.sheets(result)
    assert verdicts.rows == [
        ["2", "shared, tanh", "LoRA, MLP", "+3.5 (+3.5…+3.5)", "+3.5 (+3.5…+3.5)", "+12.0 (+12.0…+12.0)"]
    ]
    assert "is reached" in verdicts.notes[0]
    rows = {row[0]: row[1] for row in tried.rows}
    assert len(rows) == len(REGISTERED)
    assert (rows["shared, tanh *"], rows["LoRA, MLP *"], rows["shared and cross"]) == ("65.5", "60.5", "64.5")
    assert {row[0] for row in means.rows} == {*PLAIN, "shared, tanh", "LoRA, MLP"}
    assert not any("by validation" in note for note in means.notes)
    text = search_view.setup(result)
    assert text.startswith("A suite's tasks are two halves")
    assert "First half: The base is" in text
    noted = search_view.setup(result | {"note": "On two machines."})
    assert "On two machines. First half: The base is" in noted
    again = told(_right)
    assert search(replace(PLAN, tasks=(), methods=SEQUENCE.methods), tmp_path / "runs.jsonl") == result
    assert again == []


def test_a_target_is_missed_where_the_interval_reaches_below_zero(told: Any, tmp_path: Path) -> None:
    def right(run: Run) -> tuple[float, float]:
        validation, test = _right(run)
        return validation, test + (run.method == "shared, tanh") * (20.0 if run.seed else -40.0)

    told(right)
    [verdict] = search(replace(PLAN, tasks=(), methods=SEQUENCE.methods), tmp_path / "runs.jsonl")["verdicts"]
    assert verdict["difference"]["mean"] > verdict["target"]
    assert verdict["difference"]["low"] < 0
    assert not verdict["reached"]


# --- seeds are added --------------------------------------------------------------------------------------


def test_seeds_are_added_until_intervals_are_narrow(told: Any, tmp_path: Path) -> None:
    def right(run: Run) -> tuple[float, float]:
        return 50.0, 50.0 + (run.seed % 2) * 6.0 * (run.method == "shared")

    asked = told(right)
    result = measure(replace(PLAN, until=1.5), tmp_path / "runs.jsonl")
    seeds = result["settings"]["seeds"]
    assert 4 < seeds < 60
    for count, narrow in ((seeds, True), (4, False)):
        found = bootstrap([settled([(seed % 2) * 6.0 for seed in range(count)])])
        assert ((found.high - found.low) / 2 <= 1.5) is narrow
    [lora, shared] = result["cells"]
    assert len(lora["test"]) == len(shared["test"]) == seeds
    assert {run.seed for run in asked} == set(range(seeds))

    capped = measure(replace(PLAN, until=1e-3, most_seeds=7), tmp_path / "capped.jsonl")
    assert capped["settings"]["seeds"] == 7
    assert measure(PLAN, tmp_path / "runs.jsonl")["settings"]["seeds"] == 4


def test_tuning_looks_at_added_seeds_too(told: Any, tmp_path: Path) -> None:
    def right(run: Run) -> tuple[float, float]:
        return 50.0 + (run.seed > 5) * (run.rate > 2e-3), 50.0 + (run.seed % 2) * 6.0 * (run.method == "shared")

    asked = told(right)
    result = measure(replace(PLAN, tuning_seeds=0, until=1e-3, most_seeds=7), tmp_path / "runs.jsonl")
    assert Counter((run.method, run.rate) for run in asked) == dict.fromkeys(
        itertools.product(PLAN.methods, PLAN.rates), 7
    )
    assert (result["settings"]["seeds"], result["settings"]["tuning_seeds"]) == (7, 7)
    assert {cell["rate"] for cell in result["cells"]} == {3e-3}  # which only the seventh seed prefers
    assert [len(tests) for tests in result["cells"][1]["tests"]] == [7, 7]


def test_the_widest_interval_decides() -> None:
    lora, still, restless = (Contestant(2, method, 2, 100) for method in (LORA, "shared", "cross"))
    final = {(one, "t"): settled([50.0] * 4) for one in (lora, still)}
    final[restless, "t"] = settled([50.0, 60.0, 50.0, 60.0])
    assert widest([lora, still], ["t"], final) == 0
    assert widest([lora, restless], ["t"], final) == widest([lora, still, restless], ["t"], final) == 5


def test_an_interval_over_tasks_is_wider() -> None:
    apart = [settled([0.0] * 5), settled([100.0] * 5)]
    within, over = bootstrap(apart), bootstrap(apart, over_tasks=True)
    assert (within.low, within.high) == (50, 50)
    assert (over.mean, over.low, over.high) == (50, 0, 100)


def test_full_fine_tuning_is_no_reason_to_go_on(told: Any, tmp_path: Path) -> None:
    told(lambda run: (50.0, 50.0 + 20.0 * (run.method == FULL) * run.seed))
    plan = replace(PLAN, methods=(FULL, LORA, "shared"), until=1.5)
    assert measure(plan, tmp_path / "runs.jsonl")["settings"]["seeds"] == 4


# --- the command line -------------------------------------------------------------------------------------


def test_search_through_the_command_line(tmp_path: Path, told: Any, capsys: pytest.CaptureFixture[str]) -> None:
    told(_right)
    record = tmp_path / "benchmarks" / "results"
    arguments = ["accuracy", "--search", "--budgets", "2", "--rates", "1e-3,3e-3", "--pretraining-steps", "1"]
    main([*arguments, "--name", "accuracy-search", "--workers", "1", "--output", str(record)])
    assert "What was chosen on the first half" in capsys.readouterr().out
    assert json.loads((record / "accuracy-search.json").read_text())["verdicts"][0]["reached"]
    page = write_page(chapters(record), record=record, page=tmp_path / "docs" / "benchmarks.md").read_text()
    assert "## Accuracy at equal budgets: search" in page
    assert "| 2 | shared, tanh | LoRA, MLP | +3.5 (+3.5…+3.5) | +3.5 (+3.5…+3.5) | +12.0 (+12.0…+12.0) |" in page


def test_text_has_a_model_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"task": "t", "split": split, "prompt": "a", "answer": "b"} for split in ("train", "validation", "test")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        main(["accuracy", "--suite", "text", "--model", "m", "--data", str(data), "--output", str(tmp_path / "out")])
    assert "--model goes with --suite sequence: text has a model of its own" in capsys.readouterr().err
