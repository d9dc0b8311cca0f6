"""What a GPU would launch, counted in the code that Inductor writes for one: an unmerged LoRA costs no launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.contenders.settings import Settings
from benchmarks.kernels import kernels, pretend_cuda
from benchmarks.kernels.launches import Count, cuda_launches
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
    fused, packed, base = (layer(name, "decode") for name in (BACKEND, "base (packed)", "base"))
    assert launches(fused) == launches(packed)
    assert launches(fused) <= launches(base) - 2
    assert {name for kind, name in fused if kind == "gemm"} == {"extern_kernels.mm", "extern_kernels.bmm"}


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
