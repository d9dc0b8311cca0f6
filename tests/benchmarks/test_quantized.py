"""A base in few bits is trained over, deployed in every way, and timed: what the tables say of it."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.accuracy.model import Pretraining
from benchmarks.accuracy.recipe import Recipe
from benchmarks.contenders.settings import Settings
from benchmarks.quantized import decoding, quantized
from benchmarks.quantized.commands import QUANTIZED
from benchmarks.quantized.decoding import REFERENCE, WAYS
from benchmarks.quantized.task import FORMATS
from tests.quiet_sessions import noted

FEW = (REFERENCE, "4 bits kept, int8 activations, LoRA live", "NF4 kept, LoRA live")


@pytest.mark.parametrize("ways", [FEW, pytest.param(tuple(WAYS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_all_parts_in_small(ways: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = noted(monkeypatch, decoding)
    for way in {*WAYS}.difference(ways):
        monkeypatch.delitem(WAYS, way)
    if ways == FEW:
        monkeypatch.delitem(FORMATS, "NF4")
    steps: dict[str, list[tuple[int, int]]] = {}

    def bar(name: str) -> Any:
        return lambda *step: steps.setdefault(name, []).append(step)

    result = quantized.measure(
        Settings("tiny", rank=4, threads=1),
        pretraining=Pretraining(hidden=64, intermediate=128, layers=1, heads=2, steps=3, batch=4),
        recipe=Recipe(steps=3, batch=4),
        large="tiny",
        prompt=5,
        rounds=2,
        progress=bar,
    )
    found = result["quantized"]
    rows = {(row["format"], row["way"]): row for row in found["task"]}
    assert len(rows) == 5 * len(FORMATS) + 1
    for name in FORMATS:
        live, merged = rows[name, "live, kept"], rows[name, "merged in float"]
        assert max(live["error"], merged["error"], rows[name, "live, dequantized at load"]["error"]) < 1e-5
        assert rows[name, "no adapter"]["error"] > 1e-5
        assert live["bytes"] < merged["bytes"]
    assert rows["4 bits", "live, kept, int8 activations"]["error"] > rows["4 bits", "live, kept"]["error"]
    assert [row["way"] for row in found["decode"]] == [*ways]
    assert found["decode"][0]["ratio"] == 1
    assert quiet == [True] * len(ways), "a session's threads would take the time of the next one"
    sizes = {row["way"]: row["bytes"] for row in found["sizes"]}
    linears = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 160
    assert sizes["float16"] == 2 * linears
    assert sizes["NF4, blocks of 64"] == linears // 2 + 4 * linears // 64
    assert all(linears // 2 < sizes[f"4 bits, groups of {group}"] < 0.4 * sizes["float16"] for group in (128, 32))
    assert len({row["adapter"] for row in found["sizes"]}) == 1
    assert {name: done[-1][0] == done[-1][1] for name, done in steps.items()} == dict.fromkeys(steps, True)
    task, tokens, layers = QUANTIZED.sheets(result)
    assert len(task.rows) == len(rows)
    assert len(tokens.rows) == len(ways)
    assert layers.rows[0][2] == "1.000"
    assert "tiny shape, 2 layers" in QUANTIZED.setup(result)
