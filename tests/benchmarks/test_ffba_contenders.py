"""FFBA beside the LoRA: as many parameters, references of its own, and overhead that is compared with the LoRA's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.contenders import ffba
from benchmarks.contenders.models import PLACEMENTS, Adapted, adapters_of, ffba_of, make_model, weights_of
from benchmarks.contenders.settings import PROJECTIONS, SHAPES, Settings
from benchmarks.contenders.torch_contenders import RUNNERS
from benchmarks.latency import latency
from benchmarks.latency import view as latency_view

TINY = Settings(shape="tiny", rank=4, threads=1)
NO_RANK = Settings(shape="tiny", rank=1, targets=("k_proj",), threads=1)  # 192 parameters for two layers

FORMS: dict[str, Adapted] = {
    "FFBA block": "ffba-block",
    "FFBA block (fused)": "ffba-block",
    "FFBA shared": "ffba-shared",
    "FFBA shared (fused)": "ffba-shared",
}
BACKEND: dict[str, Adapted] = {
    "FFBA block (flora backend)": "ffba-block",
    "FFBA shared (flora backend)": "ffba-shared",
}


@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj")])
@pytest.mark.parametrize("shape", ["smollm-135m", "llama-3.2-1b", "tiny"])
def test_rank_is_the_largest_with_no_more_parameters_than_the_lora(shape: str, targets: tuple[str, ...]) -> None:
    """One more rank takes an A and a B per block, or an A per block and a B per projection."""
    settings = Settings(shape=shape, layers=2, targets=targets)
    hidden, wide, head = (int(str(SHAPES[shape][name])) for name in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = (head * int(str(SHAPES[shape][name])) for name in ("num_attention_heads", "num_key_value_heads"))
    attention, mlp = queries + 2 * keys + hidden, 2 * wide + hidden
    lora = weights_of(settings, "peft")
    of_a_rank = {"block": 2 * 4 * hidden, "shared": 2 * (2 * hidden + attention + mlp)}
    for adapted, placement in PLACEMENTS.items():
        rank = lora.adapter // of_a_rank[placement]
        assert ffba_of(settings, adapted) == {"ffba": {"placement": placement, "rank": rank}}
        found = weights_of(settings, adapted)
        assert found == replace(lora, adapter=rank * of_a_rank[placement])
        assert 1 < found.floor(1) <= lora.floor(1)


def test_ranks_of_the_measured_shape() -> None:
    rows = [ffba_of(Settings(layers=4, rank=16), adapted) for adapted in ("base", "peft", "ffba-block", "ffba-shared")]
    assert ffba.note(rows) == [
        "FFBA block has rank 70, shared has rank 25: the largest with no more parameters than the LoRA."
    ]


@pytest.mark.parametrize(
    ("adapted", "count"), [("base", 0), ("merged", 0), ("peft", 28), ("ffba-block", 8), ("ffba-shared", 18)]
)
def test_adapters_are_random_frozen_and_scaled_by_two(adapted: Adapted, count: int) -> None:
    model = make_model(TINY, adapted)
    found = adapters_of(model)
    assert len(found) == count
    assert sum(weight.numel() for weight in found.values()) == weights_of(TINY, adapted).adapter
    assert all(weight.std() > 0 for weight in found.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    scalings = [getattr(module, "scaling", None) for module in model.modules()]  # attention has one, too: a number
    scales = {scale for scaling in scalings if isinstance(scaling, dict) for scale in scaling.values()}
    assert scales == ({2.0} if count else set())


def _job(settings: Settings, runner: str, *contenders: str) -> latency.Job:
    return latency.Job(settings, runner, prompt=4, new=2, passes=1, contenders=contenders)


def test_ffba_contends_under_every_runner() -> None:
    found = {
        runner: {name: model for name, model in _job(TINY, runner).models.items() if model in PLACEMENTS}
        for runner in ("eager", "inductor", "reduce-overhead", "onnxruntime")
    }
    assert found == {
        "eager": FORMS,
        "inductor": FORMS | BACKEND,
        "reduce-overhead": FORMS,
        "onnxruntime": {name: FORMS[name] for name in ("FFBA block (fused)", "FFBA shared (fused)")},
    }


@pytest.mark.parametrize("runner", ["eager", "inductor", "reduce-overhead"])
def test_ffba_is_fused_as_the_lora_is(runner: str) -> None:
    forms = RUNNERS[runner]
    for adapted, placement in PLACEMENTS.items():
        assert forms[f"FFBA {placement} (fused)"] == replace(forms["fused"], adapted=adapted)
        assert forms[f"FFBA {placement}"] == replace(forms["PEFT"], adapted=adapted)


def test_what_ffba_leaves_is_of_the_loras_overhead() -> None:
    """Not of that of its own live form; its floor and its streaming limit are of its own weights."""
    taken = {"base": 10.0, "PEFT": 15.0, "FFBA block": 14.0, "FFBA block (fused)": 12.0}
    turns = {name: [[milliseconds, milliseconds]] for name, milliseconds in taken.items()}
    group = {"samples": dict.fromkeys(latency.METRICS, turns), "refused": {}, "unavailable": {"FFBA shared": "no rank"}}
    group["notes"] = {}
    rows = {row["variant"]: row for row in latency.rows([group], _job(TINY, "eager"), ceiling=1e9)}
    left = {name: row["tpot"]["left"] for name, row in rows.items() if "left" in row.get("tpot", {})}
    assert left == pytest.approx({"FFBA block": 0.8, "FFBA block (fused)": 0.4})
    weights = weights_of(TINY, "ffba-block")
    for name in left:
        assert rows[name]["ffba"] == {"placement": "block", "rank": 17}
        assert rows[name]["tpot"]["floor"] == weights.floor(1)
        limit = weights.bytes(torch.float32) / 1e9 * 1e3
        assert rows[name]["tpot"]["of_streaming_limit"] == pytest.approx(limit / taken[name])
    assert rows["PEFT"]["tpot"]["floor"] == weights_of(TINY, "peft").floor(1)
    assert rows["FFBA shared"]["refused"] == "no rank"
    [sheet] = latency_view.sheets({"rows": list(rows.values()), "new": 2})
    assert list(sheet.notes)[-1].startswith("FFBA block has rank 17: ")


def test_a_lora_of_few_parameters_buys_no_rank_and_the_row_says_so() -> None:
    group = latency.sample(_job(NO_RANK, "eager", "base", "FFBA block"), 0, lambda done, total: None)
    assert list(group["samples"]["ttft"]) == ["base"]
    assert "parameters are too few" in group["unavailable"]["FFBA block"]
