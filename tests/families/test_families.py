"""Each family in each mode: what was fused, what was declined and why, and that the outputs are the same."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from .adapt import adapters_of
from .observe import MODES, Uncaptured, effect, observe
from .page import PAGE, markdown
from .row import Fate, Row
from .rows import ROWS


def cells() -> Iterator[Any]:
    for row in ROWS:
        for mode in MODES:
            marks = [pytest.mark.slow] if mode in row.slow else []
            yield pytest.param(row, mode, marks=marks, id=f"{row.name}, {row.given} {mode}")


@pytest.mark.parametrize(("row", "mode"), list(cells()))
def test_adapters_are_fused_or_declined_as_the_table_says_and_the_outputs_are_exact(row: Row, mode: str) -> None:
    if row.needs:
        pytest.importorskip(row.needs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of layers that have no rank of their own
        case = row.build()
    assert len(adapters_of(case.model)) == row.adapters
    assert effect(case) > 0.01, "adapters that change nothing prove nothing"
    fate: Fate = getattr(row, mode)
    if fate.refused:
        with pytest.raises(Uncaptured) as refusal:
            observe(case, mode)
        assert fate.refused in str(refusal.value)
        return
    found = observe(case, mode)
    assert found.error <= (row.tolerance if mode == "compiled" else 1e-10)
    report = found.report
    assert len(report.fused) == fate.fused, str(report)
    assert Counter(d.reason for d in report.declines) == {reason: n for reason, n, _ in fate.declines}, str(report)
    assert (report.ops_before["gemm"], report.ops_after["gemm"]) == fate.gemms, str(report)


def test_what_is_not_fused_is_explained() -> None:
    for row in ROWS:
        for mode in MODES:
            fate: Fate = getattr(row, mode)
            told = [told for *_, told in fate.declines if told] + [fate.why] * bool(fate.why)
            assert told or fate.fused == row.adapters, f"{row.name} {mode}"


def test_the_page_is_that_of_the_rows() -> None:
    assert Path(PAGE).read_text(encoding="utf-8") == markdown(), "run `python -m tests.families.page`"
