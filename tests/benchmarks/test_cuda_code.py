"""What a GPU would launch, counted in the code that Inductor writes for one: an unmerged LoRA costs no launch."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.contenders.settings import Settings
from benchmarks.kernels import kernels, pretend_cuda
from benchmarks.kernels.launches import Count, cuda_launches
from benchmarks.show.results import RECORD
from flora_fx.errors import require

SETTINGS = Settings("tiny", rank=16, dtype="bfloat16")
BACKEND = "fused (flora backend)"


def layer(variant: str, phase: str) -> dict[tuple[str, str], int]:
    """Launches that one more layer adds, by kind and name."""
    runner = kernels.RUNNERS["cuda-code"]
    shallow, deep = (
        kernels._count(runner, variant, phase, replace(SETTINGS, layers=depth), 40) for depth in kernels.DEPTHS
    )
    return {key: deep[key] - shallow[key] for key in {**shallow, **deep} if deep[key] != shallow[key]}


def launches(count: Count | dict[tuple[str, str], int]) -> int:
    return sum(count.values())


def test_a_token_with_a_lora_takes_no_launch_more_than_without() -> None:
    fused, packed = (layer(name, "decode") for name in (BACKEND, "base (packed)"))
    assert launches(fused) == launches(packed)
    assert {name for kind, name in fused if kind == "gemm"} == {"extern_kernels.mm", "extern_kernels.bmm"}


@pytest.mark.slow
def test_a_token_with_a_lora_takes_fewer_launches_than_the_base_as_it_is() -> None:
    fused, base = (layer(name, "decode") for name in (BACKEND, "base"))
    assert launches(fused) <= launches(base) - 2


@pytest.mark.slow
def test_a_prompt_with_a_lora_takes_fewer_launches_than_the_base_and_copies_nothing() -> None:
    fused, base, peft = (layer(name, "prefill") for name in (BACKEND, "base", "PEFT"))
    assert launches(fused) <= launches(base) - 2
    assert launches(peft) >= launches(base) + 14
    assert not [name for _, name in fused if "addmm" in name]  # a library copies what it adds to


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["block", "shared"])
def test_ffba_takes_fewer_launches_than_the_base(placement: str) -> None:
    fused, base = (layer(name, "decode") for name in (f"FFBA {placement} (flora backend)", "base"))
    assert launches(fused) <= launches(base) - 2


def test_a_compiled_function_is_counted_and_runs_as_it_is() -> None:
    x = torch.ones(4, 6, device="meta")
    compiled = torch.compile(lambda x: torch.relu(x @ x.t()) + 1)
    assert cuda_launches(lambda: compiled(x)) == {("gemm", "extern_kernels.mm"): 1, ("generated", "triton"): 1}


def test_without_triton_a_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = kernels.RUNNERS["cuda-code"]
    monkeypatch.setitem(kernels.RUNNERS, "cuda-code", replace(runner, variants={"base": runner.variants["base"]}))
    monkeypatch.setattr(pretend_cuda, "require", lambda module, extra: require("no_such_module", extra))
    rows = kernels.measure(replace(SETTINGS, layers=2), runners=("cuda-code",), prompt=8)["rows"]
    assert [row["unavailable"] for row in rows] == [
        "'no_such_module' is needed here and is not installed; install it with: pip install 'flora-fx[test]'"
    ] * 2


SHAPES = ("llama-3.2-1b", "gemma-2-2b", "gpt2", "qwen3-0.6b")
MORE = {"gpt2": 1, "qwen3-0.6b": 2}
"""Launches a layer beyond the packed base, at a token. GPT-2 rotates nothing, so the sum of q, k and v is a kernel of
its own; Qwen3 normalizes q and k before it rotates them, so each is written once more."""


def record(shape: str) -> list[dict[str, Any]]:
    """The rows of a shape."""
    name = "kernels-cuda-code" if shape == SHAPES[0] else f"kernels-cuda-code-{shape}"
    rows: list[dict[str, Any]] = json.loads((RECORD / f"{name}.json").read_text())["rows"]
    return rows


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_record_of_each_shape(shape: str, phase: str) -> None:
    rows = [row for row in record(shape) if row["phase"] == phase]
    found = {row["variant"]: sum(row["per_layer"].values()) for row in rows}
    assert found[BACKEND] <= found["base (packed)"] + MORE.get(shape, int(phase == "prefill"))
    assert found[BACKEND] <= found["base"] + (1 if shape == "gpt2" else -1)  # one projection is q, k and v: no pack
    assert found["PEFT"] >= found["base"] + (8 if shape == "gpt2" else 14)
    names = next(row["names"] for row in rows if row["variant"] == BACKEND)
    if shape != "gpt2":  # whose addmm adds a bias, as the base's does
        assert not [name for name in names if "addmm" in name]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_each_shape_is_counted_as_in_the_record(shape: str) -> None:
    settings = Settings(shape, dtype="bfloat16", threads=1)
    measured = kernels.measure(settings, runners=("cuda-code",), variants=(BACKEND,))["rows"]
    assert measured == [row for row in record(shape) if row["variant"] == BACKEND]
