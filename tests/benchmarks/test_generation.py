"""Whole loops: both choose the same tokens, a token is more than its run, a swap gives PyTorch's tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contenders.settings import Settings
from benchmarks.generation import generation
from benchmarks.generation import loops as generation_loops
from benchmarks.generation import swaps as generation_swaps
from benchmarks.generation.loops import CHOICES, LOOPS, Job, loops, python, related

SETTINGS = Settings(shape="tiny", layers=1, rank=6, threads=1)

Graphs = Mapping[str, Path | str]


def _job(graphs: Graphs, settings: Settings = SETTINGS) -> Job:
    return Job(settings, Path(graphs["fused"]), prompt=9, new=4, passes=2)


def test_loops_choose_the_same_tokens_in_turns(graphs: Graphs) -> None:
    groups = [loops(_job(graphs), seed, lambda done, total: None) for seed in range(2)]
    assert {name: [len(steps) for steps in passes] for name, passes in groups[0]["tpot"].items()} == {
        name: [4, 4] for name in LOOPS
    }
    found = related(groups)
    assert (found["equal"], found["generations"]) == (4, 4)
    theirs, ours = found["rows"]
    assert (theirs["variant"], theirs["ttft"]["ratio"], theirs["tpot"]["ratio"]) == ("onnxruntime-genai", 1, 1)
    assert ours["tpot"]["low"] <= ours["tpot"]["ratio"] <= ours["tpot"]["high"]


def test_unequal_tokens_are_counted(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(generation_loops._Ours):
        def go_on(self) -> None:
            super().go_on()
            self.tokens[-1] = [-1]

    monkeypatch.setitem(LOOPS, "flora_fx", Stuck)
    assert loops(_job(graphs), 0, lambda done, total: None)["equal"] == 0


def test_what_is_not_in_the_run_is_python(graphs: Graphs) -> None:
    found = python(_job(graphs), lambda done, total: None)
    assert list(found) == list(CHOICES)
    for taken in found.values():
        assert 0 < taken["rest"] < taken["step"]
        assert 0 < taken["run"] < taken["step"]


def _here(function: Callable[..., Any], *args: Any, threads: int, progress: Any) -> Any:
    return function(*args, progress)


def test_suite_leaves_json_and_sheets(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "write_graphs", lambda settings, place, progress, names: graphs)
    for module in (generation, generation_swaps):
        monkeypatch.setattr(module, "isolated", _here)
    result = generation.measure(SETTINGS, prompt=9, new=3, rounds=4, processes=2, swaps=5)
    swaps = result["swaps"]
    assert (swaps["count"], swaps["right"]) == (5, 5)
    assert 0 < swaps["low"] <= swaps["milliseconds"] <= swaps["high"]
    assert swaps["after"] - swaps["before"] < 50 * 2**20
    sheets = generation.sheets(json.loads(json.dumps(result)))
    assert [row[0] for sheet in sheets for row in sheet.rows] == [*LOOPS, *CHOICES, "from a directory"]
    assert sheets[0].notes == ["Both chose the same tokens in 4 of 4 generations."]


def test_part_that_fails_says_why_and_stops_nobody(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {"fused": graphs["fused"], "fused (hot swap)": "it has no LoRA"}
    monkeypatch.setattr(generation, "write_graphs", lambda settings, place, progress, names: written)

    def fails(function: Callable[..., Any], *args: Any, threads: int, progress: Any) -> Any:
        if function is loops:
            raise RuntimeError("loops: its process died")
        return function(*args, progress)

    monkeypatch.setattr(generation, "isolated", fails)
    result = generation.measure(SETTINGS, prompt=9, new=3, rounds=4, processes=2, swaps=5)
    assert result["loops"] == {"refused": "loops: its process died"}
    assert result["swaps"] == {"refused": "it has no LoRA"}
    first, second, third = generation.sheets(result)
    assert first.notes == ["Refused: loops: its process died."]
    assert third.notes == ["Refused: it has no LoRA."]
    assert len(second.rows) == len(CHOICES)
