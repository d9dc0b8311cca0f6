"""The graphs of the latency suite: each peer is written, runs, and computes what the model does; or says why not."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import onnx_contenders, onnx_exports
from benchmarks.contenders.models import make_model
from benchmarks.contenders.onnx_contenders import GrowingContender, SharedContender
from benchmarks.contenders.onnx_exports import GRAPHS, count_nodes, write_graphs
from benchmarks.contenders.settings import Settings
from benchmarks.latency import goals, latency
from benchmarks.latency import view as latency_view
from flora_fx.errors import ExportError
from flora_fx.measuring.method import difference

SETTINGS = Settings(shape="tiny", layers=1, rank=6, threads=1)
PROMPT, NEW = 9, 3

Graphs = Mapping[str, Path | str]


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
    for name, contender in onnx_contenders.onnx_contenders(settings, graphs, NEW).items():
        assert not isinstance(contender, str), contender
        assert not contender.compiled
        for _ in range(2):
            found = [contender.prefill(tokens[:, :PROMPT]).clone()]
            found += [contender.decode(token).clone() for token in tokens[:, PROMPT:].split(1, dim=1)]
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

    from flora_fx.export.trace.model import unwrap

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
    assert fused["GroupQueryAttention"] == genai["GroupQueryAttention"] == SETTINGS.layers
    swapped, general = count_nodes(paths["fused (hot swap)"]), count_nodes(paths["fused (general)"])
    sizes = [sum(nodes.values()) for nodes in (fused, swapped, genai, general)]
    assert sizes == sorted(sizes)
    assert "GroupQueryAttention" not in general


def test_what_may_share_past_and_present_does(graphs: Graphs) -> None:
    """One buffer for all that can, whoever exported it; nothing is compared under two ways to keep a cache."""
    loaded = onnx_contenders.onnx_contenders(SETTINGS, graphs, NEW)
    growing = {name for name, contender in loaded.items() if isinstance(contender, GrowingContender)}
    assert growing == {"fused (general)"}
    assert all(isinstance(loaded[name], SharedContender) for name in loaded.keys() - growing)


def test_graph_that_cannot_be_captured_runs_without_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        note = ""

        def __init__(self, *_: Any, cuda_graph: bool = False) -> None:
            if cuda_graph:
                raise ExportError("nodes are on the CPU")

    monkeypatch.setattr(onnx_contenders, "SharedContender", Refusing)
    monkeypatch.setattr(onnx_contenders, "_shares", lambda directory: True)
    settings: Any = SimpleNamespace(device="cuda", batch=1)
    contender = onnx_contenders._load(settings, Path(), NEW)
    assert contender.note == "runs without a CUDA graph: nodes are on the CPU"


def test_ratios_to_another_reference_and_to_peers(graphs: Graphs) -> None:
    """As the decoder suite has them; a live model takes turns with ONNX Runtime's if it is named."""
    names = ("base", "fused", "PEFT (genai)", "PEFT (eager)")
    few = {name: graph for name, graph in graphs.items() if name in names}
    job = latency.Job(SETTINGS, "onnxruntime", PROMPT, NEW, 2, few, names, "PEFT (genai)", ("base",))
    group = latency.sample(job, 0, lambda done, total: None)
    assert group["refused"] == group["unavailable"] == group["notes"] == {}
    rows = {row["variant"]: row for row in latency.rows([group, group], job, ceiling=1e9)}
    assert list(rows) == list(names)
    assert rows["PEFT (genai)"]["tpot"]["ratio"] == 1
    assert list(rows["fused"]["tpot"]["against"]) == ["base"]
    assert rows["fused"]["tpot"]["against"]["base"]["ratio"] == rows["fused"]["tpot"]["own"]
    assert "against" not in rows["base"]["tpot"]
    found = [row | {"nodes": 12, "note": "runs backwards"} for row in rows.values()]
    [sheet] = latency_view.sheets({"reference": "PEFT (genai)", "new": NEW, "rows": found})
    assert sheet.header[2] == "× PEFT (genai)"
    assert sheet.header[-1] == "nodes"
    assert [row[-1] for row in sheet.rows if row[0] in names] == ["12"] * 4
    assert "fused runs backwards." in sheet.notes


def _row(variant: str, ratio: float, against: Mapping[str, float], nodes: int) -> dict[str, Any]:
    def timing(ratio: float) -> dict[str, Any]:
        return {"milliseconds": 2.0, "ratio": ratio, "low": ratio - 0.01, "high": ratio + 0.01}

    timings = timing(ratio) | {"against": {peer: timing(to) for peer, to in against.items()}}
    return {"variant": variant, "prompt": 8, "ttft": timings, "tpot": timings, "nodes": nodes}


def test_goals_stand_beside_what_was_measured() -> None:
    rows = [
        _row("base (genai)", 1, {}, 56),
        _row("fused", 1.045, {"PEFT (genai)": 0.98}, 101),
        _row("FFBA block (fused)", 1.0, {}, 62),
        {"variant": "fused (hot swap)", "prompt": 8, "refused": "wrong"},
    ]
    settings = {"device": "cpu", "layers": 4}
    [sheet] = goals.sheets({"settings": settings, "reference": "base (genai)", "rows": rows})
    assert [list(row) for row in sheet.rows] == [
        ["fused: TPOT × base (genai)", "1.05", "1.045 (1.035–1.055)", "by the median, not by the whole interval"],
        ["fused: TTFT × base (genai)", "1.07", "1.045 (1.035–1.055)", "yes"],
        ["fused: TPOT × PEFT (genai)", "1.00", "0.980 (0.970–0.990)", "yes"],
        ["fused: TTFT × PEFT (genai)", "1.00", "0.980 (0.970–0.990)", "yes"],
        ["fused: nodes", "100", "101", "no"],
        ["FFBA block (fused): nodes", "64", "62", "yes"],
    ]
    assert goals.sheets({"settings": settings | {"layers": 3}, "reference": "base", "rows": rows[:1]}) == []
    for device, asked in goals.GOALS.items():
        assert {goal.contender for goal in asked} | set(goals.peers(device)) <= set(goals.CONTENDERS[device])


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
    graphs = {"broken": tmp_path, "missing": "it was not exported"}
    loaded = onnx_contenders.onnx_contenders(SETTINGS, graphs, NEW)
    assert loaded["missing"] == "it was not exported"
    assert str(loaded["broken"]).startswith(f"ONNX Runtime cannot load {tmp_path / 'model.onnx'}")
