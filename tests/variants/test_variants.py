"""Each row of the matrix in each mode: what was fused, what was declined and why, and that the numbers are the same."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from .observe import MODES, Found, Uncaptured, observe
from .page import PAGE, markdown
from .row import Fate, Row
from .rows import ROWS


def cells() -> Iterator[Any]:
    for row in ROWS:
        for mode in MODES:
            marks = [pytest.mark.slow] if mode in row.slow else []
            yield pytest.param(row, mode, marks=marks, id=f"{row.name} {mode}")


@pytest.mark.parametrize(("row", "mode"), list(cells()))
def test_a_variant_is_fused_or_declined_as_the_table_says_and_never_wrong(row: Row, mode: str) -> None:
    if row.needs and importlib.util.find_spec(row.needs) is None:
        pytest.skip(f"needs {row.needs}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of unusual configurations
        case = row.build()
    fate: Fate = getattr(row, mode)
    if fate.refused:
        with pytest.raises(Uncaptured) as refusal:
            observe(case, mode)
        assert fate.refused in str(refusal.value)
        return
    check(observe(case, mode), fate, row.tolerance)


def check(found: Found, fate: Fate, tolerance: float) -> None:
    assert found.error <= tolerance
    report = found.report
    if report is None:
        assert not fate.fused
        assert not fate.declines
        return
    assert len(report.fused) == fate.fused, str(report)
    assert Counter(d.reason for d in report.declines) == {reason: n for reason, n, _ in fate.declines}, str(report)
    for reason, _, detail in fate.declines:
        assert all(detail in d.detail for d in report.declines if d.reason is reason), str(report)
    if fate.gemms is not None:
        assert (report.ops_before["gemm"], report.ops_after["gemm"]) == fate.gemms, str(report)


def test_the_page_is_that_of_the_rows() -> None:
    assert Path(PAGE).read_text(encoding="utf-8") == markdown(), "run `python -m tests.variants.page`"
