"""The graphs of the latency suite: each peer is written, runs, and computes what the model does; or says why not."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_fx.benchmarks import onnx_exports
from flora_fx.benchmarks.method import difference
from flora_fx.benchmarks.models import make_model
from flora_fx.benchmarks.onnx_contenders import OnnxContender, onnx_contenders
from flora_fx.benchmarks.onnx_exports import GRAPHS, count_nodes, write_graphs
from flora_fx.benchmarks.settings import Settings

SETTINGS = Settings(shape="tiny", layers=1, rank=6, threads=1)
PROMPT, NEW = 9, 3

Graphs = Mapping[str, Path | str]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """One of each kind that is written fast."""
    steps: list[tuple[int, int]] = []
    names = ("PEFT (genai)", "FFBA shared (fused)", "base", "fused")
    place = tmp_path_factory.mktemp("graphs")
    written = write_graphs(SETTINGS, place, lambda done, total: steps.append((done, total)), names=names)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert list(written) == ["base", "fused", "PEFT (genai)", "FFBA shared (fused)"]
    return written


@torch.no_grad()
def _check(graphs: Graphs, batch: int) -> None:
    """Logits of a prompt and of the tokens after it, twice: a second sequence begins anew."""
    settings = replace(SETTINGS, batch=batch)
    tokens = torch.randint(SETTINGS.vocabulary, (batch, PROMPT + NEW))
    expected: dict[str, tuple[Tensor, ...]] = {}
    for adapted in dict.fromkeys(GRAPHS[name] for name in graphs):
        model = make_model(settings, adapted, dtype=torch.float64)
        expected[adapted] = model(tokens).logits[:, PROMPT - 1 :].unbind(1)
    for one, other in itertools.combinations(expected.keys() - {"merged"}, 2):
        assert difference(expected[one][0], expected[other][0]) > 0.1
    for name, contender in onnx_contenders(settings, graphs).items():
        assert isinstance(contender, OnnxContender), contender
        assert not contender.compiled
        for _ in range(2):
            found = [contender.prefill(tokens[:, :PROMPT])]
            found += [contender.decode(token) for token in tokens[:, PROMPT:].split(1, dim=1)]
        for logits, reference in zip(found, expected[GRAPHS[name]], strict=True):
            assert difference(logits, reference) < 1e-5, name


@pytest.mark.parametrize("batch", [1, 2])
def test_graphs_compute_what_the_model_does(graphs: Graphs, batch: int) -> None:
    _check(graphs, batch)


@pytest.mark.slow
def test_every_peer_computes_what_the_model_does(tmp_path: Path) -> None:
    graphs = write_graphs(SETTINGS, tmp_path)
    assert list(graphs) == list(GRAPHS)
    for batch in (1, 2):
        _check(graphs, batch)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", ["base", "peft"])
def test_fusing_after_the_trace_is_what_the_option_does(tmp_path: Path, adapted: Any) -> None:
    """`ort_fusions` of ``OnnxConfig`` and the rewrite that is called here give the same nodes."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    from flora_fx.export.source import unwrap

    names = {"base": "base (transformers, ort_fusions)", "peft": "PEFT (transformers, ort_fusions)"}
    written = write_graphs(SETTINGS, tmp_path, names=[names[adapted]])[names[adapted]]
    ids = torch.arange(10).reshape(2, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    model = unwrap(make_model(SETTINGS, adapted))
    OnnxExporter().export_for_generation(model, inputs, config).save_pretrained(tmp_path / "option")
    assert isinstance(written, Path), written
    assert count_nodes(written) == count_nodes(tmp_path / "option")


def test_counts(graphs: Graphs) -> None:
    """The builder's LoRA: A, B and an Add for each of seven projections, no packed QKV."""
    paths = {name: Path(graph) for name, graph in graphs.items()}
    genai = count_nodes(paths["PEFT (genai)"])
    assert genai["MatMul"] == 3 * 7 + 1  # and the head
    assert genai["Add"] == 7
    base, fused = count_nodes(paths["base"]), count_nodes(paths["fused"])
    assert fused["MatMul"] - base["MatMul"] < 2 * 7


def test_a_peer_that_fails_says_why_and_stops_nobody(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of another peer\n")

    def writer(settings: Settings, model: Any, folders: list[Path]) -> Iterator[None]:
        yield
        log.write_text(log.read_text() + "converting ... cannot\n")
        raise ValueError("no such operator")

    names = ("good", "bad", "never reached")
    outcomes = dict(onnx_exports._attempt(writer, SETTINGS, None, tmp_path, names, log))
    reason = "no such operator\nconverting ... cannot"
    assert outcomes == {"good": None, "bad": reason, "never reached": reason}


def test_without_genai_its_rows_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    log = tmp_path / "log"
    log.touch()
    outcomes = dict(onnx_exports._attempt(onnx_exports._by_genai, SETTINGS, None, tmp_path, ["PEFT (genai)"], log))
    assert outcomes["PEFT (genai)"] == (
        "'onnxruntime_genai' is needed here and is not installed; install it with: pip install 'flora-fx[genai]'"
    )


def test_what_was_written_before_the_process_died_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(write: Any, settings: Settings, adapted: Any, directory: Path, *rest: Any, **options: Any) -> None:
        if adapted == "peft":
            onnx_exports._outcomes(directory, adapted).write_text('{"fused": null}')
        raise RuntimeError("_write_model: its process died with exit code -9")

    monkeypatch.setattr(onnx_exports, "isolated", dies)
    graphs = write_graphs(SETTINGS, tmp_path, names=("fused", "PEFT (genai)", "merged"))
    assert graphs == {
        "fused": tmp_path / "fused",
        "PEFT (genai)": "_write_model: its process died with exit code -9",
        "merged": "_write_model: its process died with exit code -9",
    }


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    loaded = onnx_contenders(SETTINGS, {"broken": tmp_path, "missing": "it was not exported"})
    assert loaded["missing"] == "it was not exported"
    assert str(loaded["broken"]).startswith(f"ONNX Runtime cannot load {tmp_path / 'model.onnx'}")
