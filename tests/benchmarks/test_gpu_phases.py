"""A GPU host gets through both phases: what fails or hangs stops nobody, what is done is kept, and all is rehearsed."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import commands
from benchmarks.contenders.onnx_exports import GRAPHS
from benchmarks.contenders.torch_contenders import RUNNERS
from benchmarks.gpu import PHASES, measuring, phase, preparing, section
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.phase import Phase, provider_missing
from benchmarks.gpu.plan import plan
from benchmarks.gpu.section import Section
from benchmarks.kernels import kernels
from benchmarks.latency import goals
from benchmarks.show.page import write_page
from benchmarks.show.results import RECORD
from benchmarks.suites import chapters
from benchmarks.training import training
from flora_fx.errors import MissingExtraError

from .forked import forking


def _never(*_: Any) -> Iterator[dict[str, Any]]:
    raise AssertionError("sections run in processes of their own")


def _phase(monkeypatch: pytest.MonkeyPatch, code: Mapping[str, str], **options: Any) -> Phase:
    """One whose sections run a line of Python each. Those called ``short`` have a tenth of a second."""
    sections = [
        Section(name, _never, 0.01 if name == "short" else 6, needs_provider=name == "onnxruntime") for name in code
    ]
    monkeypatch.setattr(phase, "command", lambda _, section, *rest, **kw: [sys.executable, "-c", code[section.name]])
    return Phase("prepare", lambda asked: sections, 1, **options)


def _statuses(folder: Path) -> dict[str, str]:
    record = json.loads((Folder(folder).record / "gpu-prepare.json").read_text())
    return {name: outcome["status"] for name, outcome in record["sections"].items()}


def test_sections_go_on_past_a_failure_and_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = {"fails": "raise SystemExit('no such operator')", "short": "import time; time.sleep(60)", "works": "1"}
    alone = _phase(monkeypatch, code)
    assert alone.run(tmp_path, rehearse=True) == 1
    statuses = _statuses(tmp_path)
    assert (statuses["fails"], statuses["works"]) == ("exit status 1", "done")
    assert statuses["short"].startswith("cut after")
    assert Folder(tmp_path).outcomes("prepare", plan(rehearse=True))["fails"]["output"] == "no such operator\n"
    assert "no such operator" in capsys.readouterr().out
    assert alone.run(tmp_path, minutes=0, rehearse=True) == 1
    assert set(_statuses(tmp_path).values()) == {"no time left"}


def test_a_phase_that_resumes_does_what_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = "import os; open({!r} + str(os.getpid()), 'w')"
    names = ("works", "fails", "short", "onnxruntime")
    code = {name: counted.format(str(tmp_path / f"ran {name} ")) for name in names}
    code["fails"] += "; raise SystemExit(3)"
    code["short"] += "; import time; time.sleep(60)"
    resuming = _phase(monkeypatch, code, side_by_side=True, resumes=True)
    folder = tmp_path / "folder"

    def ran() -> dict[str, int]:
        return {name: len([*tmp_path.glob(f"ran {name} *")]) for name in names if name != "short"}

    monkeypatch.setattr(phase, "provider_missing", lambda device: True)
    assert resuming.run(folder, rehearse=True) == 1
    assert ran() == {"works": 1, "fails": 1, "onnxruntime": 0}
    assert _statuses(folder)["onnxruntime"] == "waits for ONNX Runtime's CUDA provider"
    monkeypatch.setattr(phase, "provider_missing", lambda device: False)
    assert resuming.run(folder, rehearse=True) == 1
    assert ran() == {"works": 1, "fails": 1, "onnxruntime": 1}
    monkeypatch.setattr(phase, "plan", lambda rehearse: replace(plan(rehearse=rehearse), passes=7))
    resuming.run(folder, rehearse=True, only=["works"])
    assert ran() == {"works": 2, "fails": 1, "onnxruntime": 1}


def test_what_waits_for_a_provider_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = _phase(monkeypatch, {"works": "1", "onnxruntime": "1"}, side_by_side=True)
    monkeypatch.setattr(phase, "provider_missing", lambda device: True)
    assert waiting.run(tmp_path, rehearse=True) == 0


def test_sections_run_side_by_side_or_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends well only if the other one runs at the same time."""
    meet = (
        "import pathlib, time; here = pathlib.Path({!r}); here.joinpath({!r}).touch()\n"
        "while not here.joinpath({!r}).exists(): time.sleep(0.05)"
    )
    code = {one: meet.format(str(tmp_path), one, other) for one, other in itertools.permutations(("a", "b"))}
    together = _phase(monkeypatch, code, side_by_side=True)
    assert together.run(tmp_path / "folder", rehearse=True) == 0
    (tmp_path / "a").unlink(), (tmp_path / "b").unlink()
    alone = _phase(monkeypatch, code)
    monkeypatch.setattr(phase, "plan", lambda rehearse: replace(plan(rehearse=rehearse), patience=0.1))
    assert alone.run(tmp_path / "folder", rehearse=True) == 1
    assert _statuses(tmp_path / "folder")["a"].startswith("cut after")


def test_the_provider_is_looked_for_where_its_library_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        __file__ = str(tmp_path / "__init__.py")

    monkeypatch.setattr(phase, "require", lambda *_: Installed)
    assert not provider_missing("cpu")
    assert provider_missing("cuda")
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").touch()
    assert not provider_missing("cuda")

    def fails(*_: Any) -> None:
        raise MissingExtraError("onnxruntime", "onnx")

    monkeypatch.setattr(phase, "require", fails)
    assert provider_missing("cuda")


@pytest.mark.parametrize("rehearse", [False, True])
def test_plans_name_what_there_is(rehearse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU host it is too late to find a misspelt contender."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = plan(rehearse=rehearse)
    assert asked.device == ("cpu" if rehearse else "cuda")
    assert {asked.reference, asked.loops, "fused (hot swap)"} <= set(asked.graphs) <= set(GRAPHS)
    assert {"base"} <= set(asked.forms) <= set(RUNNERS[asked.runner])
    assert {"base"} <= set(asked.eager) <= set(RUNNERS["eager"])
    assert {"PEFT"} <= set(asked.training) <= set(training.VARIANTS)
    for runner, variants in asked.counted.items():
        assert asked.device in kernels.RUNNERS[runner].devices
        assert set(variants) <= set(kernels.RUNNERS[runner].variants)
    for each in PHASES.values():
        names = [section.name for section in each.sections(asked)]
        assert len(names) == len(set(names))
        assert each.threads(asked) >= 1
    if not rehearse:
        assert {goal.contender for goal in goals.GOALS["cuda"]} <= set(asked.graphs)
        assert asked.patience == 1


TITLES = {
    "The exported decoder": "decoder",
    "Latency": "latency",
    "Generation": "generation",
    "Training step": "training",
    "Kernels per decoder layer": "kernels",
}
"""Of a page's chapters, with a word that the names of their sections have."""


@pytest.mark.parametrize(
    "left_out",
    [("compile", "latency", "training", "kernels", "tests"), pytest.param((), marks=pytest.mark.slow)],
    ids=["ONNX Runtime", "all"],
)
def test_both_phases_are_rehearsed(
    left_out: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every section runs to its end; what the first phase compiled and computed, the second one finds."""
    monkeypatch.setattr(
        section, "subprocess", forking(multiprocessing.get_context("forkserver"), "kernels graph, fused")
    )
    asked = plan(rehearse=True)

    def rehearsed(phase: str) -> list[Section]:
        sections = [one for one in PHASES[phase].sections(asked) if not any(word in one.name for word in left_out)]
        status = PHASES[phase].run(tmp_path, rehearse=True, only=[section.name for section in sections])
        assert status == 0, capfd.readouterr().out
        return sections

    rehearsed("prepare")
    place = Folder(tmp_path)
    assert set(_statuses(tmp_path).values()) == {"done"}
    computed = {file.name for file in place.references.iterdir()}

    sections = rehearsed("measure")
    assert {file.name for file in place.references.iterdir()} == computed
    found = {section.name: place.found("measure", section.name) for section in sections}
    for name in {"decoder", "decoder, tuned", "latency", "latency, eager", "training"} & found.keys():
        rows = found[name]["rows"]  # type: ignore[index]
        assert rows
        assert not [row for row in rows if {"refused", "unavailable"} & row.keys()], name
    assert {row["variant"] for row in found["decoder"]["rows"]} == set(asked.graphs)  # type: ignore[index]
    assert {row["prompt"] for row in found["decoder"]["rows"]} == set(asked.prompts)  # type: ignore[index]
    assert found["decoder, tuned"]["entries"] == dict(measuring.TUNED)  # type: ignore[index]
    for name in {"latency", "training"} & found.keys():
        caches: dict[str, int] = found[name]["caches"]  # type: ignore[index]
        assert caches["fxgraph_cache_hit"] > 0
        assert not caches.keys() & {"fxgraph_cache_miss", "fxgraph_cache_bypass"}, caches
    if "latency" in found:
        runners = {row["runner"] for row in found["latency"]["rows"]}  # type: ignore[index]
        assert runners == {asked.runner, f"{asked.runner}, guards skipped"}
    generation: dict[str, Any] = found["generation"]  # type: ignore[assignment]
    assert generation["swaps"]["right"] == asked.swaps
    assert generation["loops"]["equal"] == asked.passes

    records = {file.stem for file in place.record.iterdir()}
    assert records == {
        *(f"gpu-{section.record}" for section in sections),
        *("gpu-prepare", "gpu-measure", *(["gpu-kernels-rehearsal"] if "kernels" not in left_out else [])),
    }
    shown = write_page(
        chapters(place.record), record=place.record, page=tmp_path / "docs" / "benchmarks.md"
    ).read_text()
    for title, word in TITLES.items():
        assert (f"## GPU: {title}: rehearsal" in shown) == (word not in left_out)


def test_goals_are_printed_beside_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timing = {"milliseconds": 1.0, "ratio": 0.7, "low": 0.69, "high": 0.71, "against": {}}
    row = {"variant": "fused", "prompt": 1024, "tpot": timing, "ttft": timing}
    result = {"settings": {"device": "cuda", "layers": 16}, "reference": "base", "rows": [row]}
    asked, place = plan(rehearse=True), Folder(tmp_path)
    [section] = [section for section in measuring.PHASE.sections(asked) if section.name == "decoder"]
    place.keep("measure", section, result)
    measuring.PHASE.finish(asked, place)
    assert "| fused: TPOT × base | 1.03 | 0.700 (0.690–0.710) | yes |" in capsys.readouterr().out


def test_gpu_command_starts_a_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run(self: Phase, path: Path, **options: Any) -> int:
        asked.update(options, path=path, phase=self.name)
        return 0

    monkeypatch.setattr(Phase, "run", run)
    with pytest.raises(SystemExit) as ended:
        commands.main(["gpu", "measure", "--folder", str(tmp_path), "--minutes", "3", "--sections", "decoder, tuned"])
    assert ended.value.code == 0
    assert asked == {
        "phase": "measure",
        "path": tmp_path,
        "minutes": 3,
        "rehearse": False,
        "only": ["decoder, tuned"],
    }


def test_a_record_of_the_repository_is_no_rehearsal() -> None:
    assert not [*RECORD.glob("gpu-*rehearsal*")]
    assert preparing.PHASE.side_by_side
    assert not measuring.PHASE.side_by_side
