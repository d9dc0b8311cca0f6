"""What an export takes is measured as whole commands, from files, by turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.contenders.settings import Settings
from benchmarks.scaling import exporting
from benchmarks.scaling.exporting import EXPORTERS
from flora_fx.errors import ExportError

STAGES = ["load", "capture", "fuse", "translate", "write", "check", "seal"]


def test_both_export_the_same_files_by_turns() -> None:
    steps: list[tuple[int, int]] = []
    settings = Settings("tiny", rank=4, threads=1)
    result = exporting.measure(
        settings, depths=(3,), rounds=1, progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(1, 1)]
    ours, builder = result["export"]["rows"]
    assert [row["exporter"] for row in (ours, builder)] == [*EXPORTERS]
    assert list(ours["stages"]) == STAGES
    peaks = list(ours["peaks"].values())
    assert list(ours["peaks"]) == STAGES
    assert peaks == sorted(peaks)
    assert peaks[-1] <= ours["peak_bytes"][0]
    assert sum(ours["stages"].values()) < ours["seconds"][0]
    assert builder["peak_bytes"][0] > 2**20
    imports = result["export"]["imports"]
    assert {"torch", "transformers", "peft", "flora_fx", "onnx"} <= set(imports)
    assert list(imports.values()) == sorted(imports.values(), reverse=True)
    whole, stages, packages = exporting.sheets(result)
    assert [row[:2] for row in whole.rows] == [["flora_fx", "3"], ["genai builder", "3"]]
    assert whole.rows[1][-3:] == ["1.00"] * 3
    assert [row[0] for row in stages.rows] == [*STAGES, "start and end"]
    told = sum(float(row[2]) for row in stages.rows)
    assert told == pytest.approx(ours["seconds"][0], abs=0.05)
    assert [row[0] for row in packages.rows] == [*list(imports)[: len(packages.rows) - 1], "all others"]
    assert sum(float(row[1]) for row in packages.rows) == pytest.approx(sum(imports.values()), abs=0.01 * len(imports))


def row(exporter: str, layers: int, seconds: list[float]) -> dict[str, Any]:
    return {
        "exporter": exporter,
        "layers": layers,
        "seconds": seconds,
        "cpu_seconds": [2 * number for number in seconds],
        "peak_bytes": [2**30] * len(seconds),
        "stages": {},
        "peaks": {},
    }


def test_ratios_are_within_a_round_and_slopes_between_depths() -> None:
    ours, builder = EXPORTERS
    rows = [row(ours, 4, [3, 20, 4]), row(builder, 4, [6, 10, 8]), row(ours, 8, [5, 5, 5]), row(builder, 8, [9, 12, 9])]
    sheet, _ = exporting.sheets({"export": {"rounds": 3, "rows": rows}})
    assert [line[2] for line in sheet.rows] == ["4.0", "8.0", "5.0", "9.0"]
    assert [line[5] for line in sheet.rows] == ["0.50", "1.00", "0.56", "1.00"]
    assert sheet.notes[-1] == "One more layer: flora_fx 250 ms, genai builder 250 ms."


def test_an_exporter_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"flora_fx ended with 1: (?s:.*)nowhere"):
        exporting._run("flora_fx", Settings("tiny"), tmp_path / "nowhere", tmp_path / "adapter", tmp_path / "out" / "0")
