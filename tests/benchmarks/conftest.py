"""Graphs that several tests measure, written once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from flora_fx.benchmarks.onnx_exports import write_graphs
from flora_fx.benchmarks.settings import Settings


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path | str]:
    """One of each kind that is written fast."""
    settings = Settings(shape="tiny", layers=1, rank=6, threads=1)
    steps: list[tuple[int, int]] = []
    names = ("PEFT (genai)", "FFBA shared (fused)", "fused (general)", "fused (hot swap)", "base", "fused")
    place = tmp_path_factory.mktemp("graphs")
    written = write_graphs(settings, place, lambda done, total: steps.append((done, total)), names=names)
    assert steps == [(done, 6) for done in range(1, 7)]
    assert list(written) == [
        *("base", "fused", "fused (hot swap)", "fused (general)", "PEFT (genai)", "FFBA shared (fused)"),
    ]
    return written
