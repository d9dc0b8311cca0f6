"""The suite of many adapters in one batch; rehearsed, tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks.adapters import adapters, onnx_contenders
from benchmarks.adapters.onnx_contenders import NAMES
from benchmarks.adapters.torch_contenders import FORMS, PEFT
from benchmarks.contenders import torch_contenders
from benchmarks.contenders.settings import Settings
from benchmarks.contenders.torch_contenders import available

HERE = [name for name, form in FORMS.items() if available(form, "cpu")]
ALL = [*HERE, *(name + adapters.RUNNER for name in NAMES)]
TINY = Settings("tiny", layers=1, rank=4, threads=1, batch=3)


@pytest.mark.usefixtures("library")
def test_all_contenders_are_timed_and_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Op by op here: what Inductor makes of them has tests of its own."""
    monkeypatch.setattr(torch_contenders, "_compiled", lambda step, way, options=None: step)
    done: list[tuple[int, int]] = []
    rows = adapters.sample(TINY, 2, 4, 2, ALL, tmp_path / "exports", lambda *at: done.append(at))
    assert [row["variant"] for row in rows] == ALL
    assert not [row["refused"] for row in rows if "refused" in row]
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]  # two runtimes, one after the other
    assert all(row["tokens_per_second"] > 0 for row in rows)
    rows = [{**row, "adapters": 8, "batch": 8} for row in rows]
    result = {"settings": {**vars(TINY)}, "prompt": 4, "rounds": 2, "rows": rows}
    speed, ratio = adapters.sheets(result)
    assert (speed.title, ratio.title) == ("Tokens per second", "× PEFT's adapter_names")
    assert list(speed.header) == ["adapters", "rows", *ALL]
    assert [row[:2] for row in speed.rows] == [["8", "8"]]
    assert ratio.rows[0][2 + ALL.index(PEFT)] == "1.00"
    few = {**result, "rows": [*rows, {**rows[0], "adapters": 32}]}  # where some are not measured
    assert adapters.sheets(few)[0].rows[1][2:] == [speed.rows[0][2], *[""] * (len(ALL) - 1)]
    pytest.importorskip("matplotlib")
    assert [path.exists() for path in adapters.draw(result, tmp_path / "adapters")] == [True, True]


def test_cuda_graphs_are_timed_where_there_are_any() -> None:
    assert [name for name in FORMS if name not in HERE] == [
        f"{name} (CUDA graph)" for name in ("base", "stacked", "backend")
    ]


@pytest.mark.parametrize("others", [[], ["base (eager)"], ["base (onnxruntime)"]], ids=str)
def test_few_take_part(others: list[str], tmp_path: Path) -> None:
    rows = adapters.sample(TINY, 2, 4, 1, [PEFT, *others], tmp_path / "exports", lambda *at: None)
    assert {row["variant"] for row in rows} == {PEFT, *others}
    assert next(row["ratio"] for row in rows if row["variant"] == PEFT) == 1


def test_operators_that_are_not_built_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLORA_ORT_LIBRARY", str(tmp_path / "nowhere.so"))
    assert onnx_contenders.writable("cpu") == NAMES[:5]


def test_what_is_wrong_has_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(step: Any, way: str, options: Any = None) -> Any:
        def call(*args: Tensor) -> Tensor:
            return step(*args) * 1.1

        return step if way == "eager" else call

    monkeypatch.setattr(torch_contenders, "_compiled", wrong)
    sampled = adapters.sample(TINY, 2, 4, 1, HERE, tmp_path / "exports", lambda *at: None)
    rows = {row["variant"]: row for row in sampled}
    assert not [*(tmp_path / "exports").glob("*")]
    assert {name for name, row in rows.items() if "refused" in row} == {n for n in HERE if "inductor" in n}
    assert "off float64" in rows["base (inductor)"]["refused"]
