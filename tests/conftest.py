"""One thread, one seed: models are tiny, the same numbers each time; no warnings from our own code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from tests.compatibility.differences import DIFFERENCES, expect


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    expect(items, DIFFERENCES)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(1234)
    torch.set_num_threads(1)  # threads that wait for each other cost such models more than they bring
    # Whatever our own lines cause to be warned of is an error. (An ini option cannot name all modules of a package.)
    warnings.filterwarnings("error", module=r"(flora_fx|passes|export|benchmarks)(\.|$)")
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path | str]:
    """Exported graphs that several benchmarks' tests measure, written once: one of each kind that is written fast."""
    from benchmarks.contenders.onnx_exports import write_graphs
    from benchmarks.contenders.settings import Settings

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
