"""What benchmarks' tests share: exported graphs, and a process to begin others with."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from tests.made_once import made_once

IMPORTED = [
    *("torch", "transformers.models.llama.modeling_llama", "peft", "onnxruntime", "onnxscript"),
    *("benchmarks.commands", "benchmarks.contenders.onnx_contenders"),
]
"""What most of the processes import. It takes longer than what they do."""


@pytest.fixture(scope="package", autouse=True)
def _processes_begin_with_their_imports() -> Iterator[None]:
    """New processes are forked from one that has imported all this. Those of a measurement are spawned."""
    server, real = multiprocessing.get_context("forkserver"), multiprocessing.get_context
    server.set_forkserver_preload(IMPORTED)

    def get_context(method: str | None = None) -> BaseContext:
        return server if method == "spawn" else real(method)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", get_context)
        yield


@pytest.fixture
def _spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes are spawned, as everywhere but here."""
    monkeypatch.setattr(multiprocessing, "get_context", multiprocessing.context._default_context.get_context)


@pytest.fixture(scope="session")
def graphs(run_folder: Path) -> Mapping[str, Path | str]:
    """Exported graphs that several benchmarks' tests measure: one of each kind that is written fast."""
    from benchmarks.contenders.onnx_exports import write_graphs
    from benchmarks.contenders.settings import Settings

    settings = Settings(shape="tiny", layers=1, rank=6, threads=1)
    names = ("PEFT (genai)", "FFBA shared (fused)", "fused (general)", "fused (hot swap)", "base", "fused")

    def write(place: Path) -> dict[str, Path | str]:
        place.mkdir()
        steps: list[tuple[int, int]] = []
        written = write_graphs(settings, place, lambda done, total: steps.append((done, total)), names=names)
        assert steps == [(done, 6) for done in range(1, 7)]
        return written

    found = made_once(run_folder / "graphs", write)
    assert list(found) == [
        *("base", "fused", "fused (hot swap)", "fused (general)", "PEFT (genai)", "FFBA shared (fused)"),
    ]
    assert all(Path(path).is_dir() for path in found.values())
    return found
