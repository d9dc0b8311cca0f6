"""Launches per decoder layer are counts, and the same by every way of counting."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contenders import onnx_exports
from benchmarks.contenders.settings import Settings
from benchmarks.kernels import kernels, launches
from benchmarks.kernels.kernels import measure, sheets

SETTINGS = Settings("tiny", layers=4, rank=4)
PACKS, UPS = 4, 4  # q k v | o | gate up | down, each with one block-diagonal (or only) up-projection

FFBA_GEMMS = {
    "FFBA block": 7 + 2 * 2,  # an A and a B per block
    "FFBA block (fused)": PACKS,  # A in q k v and gate up, B in o and down
    "FFBA shared": 7 + 2 + 7,  # an A per block, a B per projection
    "FFBA shared (fused)": PACKS + 2,  # q k v and gate up accumulate
}


COUNTED = {
    "eager": ("eager", ("base", "PEFT", "fused", *FFBA_GEMMS)),
    "graph": ("graph", ("base", "PEFT", "fused")),
    "graph of FFBA": ("graph", ("base", *FFBA_GEMMS)),
}
"""A runner, and what is counted of it at once."""

EACH = ["eager", "graph", pytest.param("graph of FFBA", marks=pytest.mark.slow)]


@functools.cache
def counted(name: str) -> dict[str, Any]:
    """The measurement of one of `COUNTED`."""
    runner, variants = COUNTED[name]
    return measure(SETTINGS, runners=(runner,), variants=variants, prompt=8)


def gemms(result: dict[str, Any], runner: str, key: str = "per_layer") -> dict[tuple[str, str], int]:
    return {(row["phase"], row["variant"]): row[key]["gemm"] for row in result["rows"] if row["runner"] == runner}


@pytest.mark.parametrize("name", EACH)
def test_gemms_of_a_layer(name: str) -> None:
    runner, variants = COUNTED[name]
    expected = {"base": 7, "PEFT": 21, "fused": PACKS + UPS} | FFBA_GEMMS
    phases = ("prefill", "decode")
    assert gemms(counted(name), runner) == {
        (phase, variant): expected[variant] for phase in phases for variant in variants
    }


@pytest.mark.parametrize("name", EACH)
def test_fused_has_no_elementwise_kernel_more_than_the_base(name: str) -> None:
    found = {
        row["variant"]: row["per_layer"]["elementwise"] for row in counted(name)["rows"] if row["phase"] == "decode"
    }
    assert set(found) == set(COUNTED[name][1])
    more = {"base": 0, "fused": 0, "PEFT": 14, "FFBA block": 4, "FFBA shared": 14}  # a Mul and an Add each
    for variant, count in found.items():
        if variant in more:
            assert count == found["base"] + more[variant]
        else:
            assert count <= found["base"] + 2  # a low-rank value is scaled per block, at most


def test_ranks_are_in_the_rows_and_below_the_sheets() -> None:
    result = counted("eager")
    ranks = {row["variant"]: row["ffba"]["rank"] for row in result["rows"] if "ffba" in row}
    assert ranks == {name: 17 if "block" in name else 6 for name in FFBA_GEMMS}
    said = "FFBA block has rank 17, shared has rank 6: the largest with no more parameters than the LoRA."
    assert [list(sheet.notes) for sheet in sheets(result)] == [[said]] * 2


def test_ffba_that_a_lora_of_few_parameters_buys_no_rank_of(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = kernels.RUNNERS["eager"]
    monkeypatch.setitem(
        kernels.RUNNERS, "eager", replace(runner, variants={"FFBA block": runner.variants["FFBA block"]})
    )
    rows = measure(Settings("tiny", rank=1, targets=("k_proj",)), runners=("eager",), prompt=8)["rows"]
    assert all("are too few" in row["unavailable"] for row in rows)


def test_total_is_what_a_model_of_that_depth_launches() -> None:
    runner = kernels.RUNNERS["eager"]
    found = kernels._count(runner, "fused", "decode", SETTINGS, 8)
    [row] = [r for r in counted("eager")["rows"] if (r["phase"], r["variant"]) == ("decode", "fused")]
    assert row["total"] == kernels._kinds(found)


def test_only_what_launches_is_counted() -> None:
    x = torch.ones(4, 6)
    weight = torch.ones(3, 6)

    def call() -> None:
        y = torch.nn.functional.linear(x.view(2, 2, 6), weight).transpose(0, 1)[..., :2]
        y.add_(1)
        torch.empty(3)
        torch.arange(3) + 1

    assert launches.dispatched(call) == {
        ("gemm", "aten.mm"): 1,
        ("elementwise", "aten.add_"): 1,
        ("other", "aten.arange"): 1,
        ("other", "aten.add"): 1,  # of integers
    }


def test_inductors_calls_of_a_fused_layer() -> None:
    runner = kernels.RUNNERS["inductor"]
    counts = [kernels._count(runner, "fused", "decode", Settings("tiny", layers=depth), 8) for depth in kernels.DEPTHS]
    row = kernels._row(counts, 4)
    assert row["per_layer"]["gemm"] == PACKS + 7  # an up-projection each, without zeros
    assert 0 < row["per_layer"]["generated"] < 8
    assert row["per_layer"]["other"] == 1  # attention


def test_inductors_calls_of_a_fused_ffba_layer() -> None:
    """B's that read one value stand under each other, here too: no zeros."""
    name = "FFBA shared (fused)"
    runner = kernels.RUNNERS["inductor"]
    counts = [kernels._count(runner, name, "decode", Settings("tiny", layers=depth), 8) for depth in kernels.DEPTHS]
    assert kernels._row(counts, 4)["per_layer"]["gemm"] == FFBA_GEMMS[name]


def test_a_token_through_the_backend_needs_no_gemm() -> None:
    runner = kernels.RUNNERS["inductor"]
    name = "fused (flora backend)"
    counts = [kernels._count(runner, name, "decode", Settings("tiny", layers=depth), 8) for depth in kernels.DEPTHS]
    row = kernels._row(counts, 4)
    assert "gemm" not in row["per_layer"]
    assert row["per_layer"]["generated"] >= 1


def test_onnx_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_graphs(settings: Settings, directory: Path, progress: Any = None) -> dict[str, Path | str]:
        return {"fused": directory / str(settings.layers), "PEFT (genai)": "it does not run here"}

    def count_nodes(directory: Path) -> dict[str, int]:
        layers = int(directory.name)
        return {"MatMul": 8 * layers + 1, "Add": 4 * layers, "Gather": 1}

    monkeypatch.setattr(onnx_exports, "write_graphs", write_graphs)
    monkeypatch.setattr(onnx_exports, "count_nodes", count_nodes)
    result = measure(SETTINGS, runners=("onnxruntime",), prompt=8)
    fused, peer = result["rows"]
    assert fused["per_layer"] == {"gemm": 8, "elementwise": 4}
    assert fused["names"] == {"MatMul": 8, "Add": 4}
    assert fused["total"] == {"gemm": 33, "elementwise": 16, "other": 1}
    assert peer["unavailable"] == "it does not run here"
    [sheet] = sheets(result)
    assert list(sheet.rows) == [["fused", "8", "4", "0", "12", "50"], ["PEFT (genai)", "not available"]]
    assert "it does not run here" in sheet.notes[0]


def test_gpu_kernels_are_counted_by_category(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        {"name": "nvjet_tst_64x8_64x16_1x4_h_bz_TNT", "cat": "kernel"},
        {"name": "void at::native::vectorized_elementwise_kernel<4, …>", "cat": "kernel"},
        {"name": "triton_red_fused_add_mean_0", "cat": "kernel"},
        {"name": "pytorch_flash::flash_fwd_splitkv_kernel<…>", "cat": "kernel"},
        {"name": "Memcpy HtoD", "cat": "gpu_memcpy"},
        *[{"name": "cudaLaunchKernel", "cat": "cuda_runtime"}] * 3,
        {"name": "cuLaunchKernelEx", "cat": "cuda_driver"},
        {"name": "cudaDeviceSynchronize", "cat": "cuda_runtime"},
        {"name": "aten::mm", "cat": "cpu_op"},
        {"name": "process_name", "ph": "M"},
    ]
    monkeypatch.setattr(launches, "trace", lambda call, device: events)
    kinds: Counter[str] = Counter()
    for (kind, _), times in launches.device_kernels(lambda: None).items():
        kinds[kind] += times
    assert kinds == {"gemm": 1, "elementwise": 1, "generated": 1, "other": 1, "launch": 4}


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    settings = Settings("tiny", rank=4, device="cuda", dtype="bfloat16")
    result = measure(settings, runners=("eager", "eager-profiled"), prompt=8)
    dispatched, profiled = (gemms(result, runner) for runner in ("eager", "eager-profiled"))
    assert profiled == dispatched
    assert all(row["per_layer"]["launch"] > 0 for row in result["rows"] if row["runner"] == "eager-profiled")
