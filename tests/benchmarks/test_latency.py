"""The latency suite refuses what disagrees and what did not compile, and its rows say what they must."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from benchmarks.contenders.models import Adapted, make_model, weights_of
from benchmarks.contenders.settings import SHAPES, Settings
from benchmarks.contenders.step import CachedStep, empty_cache
from benchmarks.contenders.torch_contenders import RUNNERS, Form, TorchContender, make_contender
from benchmarks.latency import latency
from benchmarks.latency import view as latency_view
from benchmarks.scaling import scaling

TINY = Settings(shape="tiny", rank=4, threads=1)
ROOT = Path(__file__).parents[2]
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9]])


@pytest.mark.parametrize("shape", sorted({*SHAPES} - {"gpt2"}))
def test_every_shape_builds(shape: str) -> None:
    """And its weights are counted right: a rank-4 A and B have 4 · (in + out) elements."""
    settings = Settings(shape=shape, layers=1, rank=4)
    with torch.device("meta"):
        counted = weights_of(settings, "peft")
    sizes = {name: int(str(SHAPES[shape][name])) for name in ("hidden_size", "intermediate_size", "head_dim")}
    hidden, wide, head = sizes.values()
    queries, keys = (head * int(str(SHAPES[shape][name])) for name in ("num_attention_heads", "num_key_value_heads"))
    dims = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), *[(hidden, wide)] * 3]
    assert counted.adapter == 4 * sum(i + o for i, o in dims)
    assert counted.head == hidden * int(str(SHAPES[shape]["vocab_size"]))
    assert 0 < counted.layers - sum(i * o for i, o in dims) < 5 * (hidden + head)  # norms


def test_gpt2_has_a_lora_on_its_own_projections() -> None:
    counted = weights_of(Settings("gpt2", layers=1, rank=4), "peft")
    dims = [(768, 3 * 768), (768, 768), (768, 3072), (3072, 768)]
    assert counted.adapter == 4 * sum(i + o for i, o in dims)
    assert counted.head == 768 * 50257


def test_floor_is_bytes_for_a_token_and_flops_for_a_prompt() -> None:
    weights = weights_of(TINY, "peft")
    assert weights.floor(1) == 1 + weights.adapter / (weights.layers + weights.head)
    assert weights.floor(10**9) == pytest.approx(1 + weights.adapter / weights.layers)
    assert weights.bytes(torch.float16) == 2 * (weights.layers + weights.head + weights.adapter)
    assert weights_of(TINY, "merged") == weights_of(TINY, "base") == replace(weights, adapter=0)


@torch.no_grad()
def test_static_step_equals_the_whole_sequence() -> None:
    settings = Settings(shape="tiny", rank=4, batch=2)
    step = CachedStep(make_model(settings, "peft", dtype=torch.float64))
    tokens = torch.randint(128, (2, 7), generator=torch.Generator().manual_seed(0))
    cache = empty_cache(settings, 12, dtype=torch.float64)
    step(tokens[:, :6], torch.tensor(0), *cache)
    last = step(tokens[:, 6:], torch.tensor(6), *cache)
    torch.testing.assert_close(last, step.model(tokens).logits[:, -1], rtol=0, atol=1e-12)


def test_models_of_one_settings_are_one_model() -> None:
    """Merged equals unmerged, and neither is the base: otherwise no comparison means anything."""
    logits = {name: make_model(TINY, name)(PROMPT).logits for name in get_args(Adapted)}
    torch.testing.assert_close(logits["merged"], logits["peft"], rtol=1e-4, atol=1e-4)
    for one, other in itertools.combinations(logits.keys() - {"merged"}, 2):
        assert (logits[one] - logits[other]).norm() > 0.5 * logits["base"].norm()


def _job(runner: str = "eager", **kwargs: object) -> latency.Job:
    return latency.Job(TINY, runner, prompt=6, new=5, passes=3, **kwargs)  # type: ignore[arg-type]


def test_rows_of_the_eager_runner() -> None:
    job = _job()
    group = latency.sample(job, 0, lambda done, total: None)
    assert group["refused"] == {}
    assert {name: [len(turns) for turns in passes] for name, passes in group["samples"]["tpot"].items()} == {
        name: [5, 5, 5] for name in RUNNERS["eager"]
    }
    rows = {row["variant"]: row for row in latency.rows([group, group], job, ceiling=1e9)}
    assert rows["base"]["tpot"]["ratio"] == 1.0
    assert "floor" not in rows["base"]["ttft"]
    assert "floor" not in rows["merged"]["ttft"]
    fused = rows["fused"]
    weights = weights_of(TINY, "peft")
    assert fused["ttft"]["floor"] == weights.floor(6)
    assert fused["tpot"]["floor"] == weights.floor(1)
    assert fused["ttft"]["floor"] >= fused["total"]["floor"] >= fused["tpot"]["floor"]
    left = (fused["tpot"]["ratio"] - 1) / (rows["PEFT"]["tpot"]["ratio"] - 1)
    assert fused["tpot"]["left"] == pytest.approx(left)
    limit = weights.bytes(torch.float32) / 1e9 * 1e3
    assert fused["tpot"]["of_streaming_limit"] == pytest.approx(limit / fused["tpot"]["milliseconds"])
    json.dumps(list(rows.values()))


def test_a_contender_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base passed off as the merged model, one FFBA adapter as the other: perhaps faster, and wrong."""
    instead: dict[Adapted, Adapted] = {"merged": "base", "ffba-shared": "ffba-block"}

    def make_another(form: Form, *args: Any) -> TorchContender:
        return make_contender(replace(form, adapted=instead.get(form.adapted, form.adapted)), *args)

    monkeypatch.setattr(latency, "make_contender", make_another)
    job = _job(contenders=("base", "merged", "PEFT", "FFBA block (fused)", "FFBA shared"))
    group = latency.sample(job, 0, lambda done, total: None)
    assert list(group["refused"]) == ["merged", "FFBA shared"]
    assert all("float64 reference" in why for why in group["refused"].values())
    rows = {row["variant"]: row for row in latency.rows([group], job, ceiling=1e9)}
    assert "tpot" not in rows["merged"]
    assert "tpot" in rows["PEFT"]
    sheet = latency_view.sheets({"rows": list(rows.values()), "new": 5})[0]
    assert ["merged", "refused"] in [list(row) for row in sheet.rows]
    assert any("float64 reference" in note for note in sheet.notes)


def test_a_contender_that_did_not_compile_is_refused() -> None:
    """What claims to be compiled and runs in eager mode, as Dynamo lets it past its recompile limit."""
    step = CachedStep(make_model(TINY, "base"))
    contenders = {"base": TorchContender(step, step, empty_cache(TINY, 8), compiled=True)}
    refused = latency._not_compiled(contenders, PROMPT, PROMPT[:, :1])
    assert refused == {"base": "a profile shows that it did not run compiled"}


def test_nothing_is_related_to_a_base_that_was_refused() -> None:
    turns = {"base": [[1.0]], "PEFT": [[2.0]]}
    told = {"refused": {"base": "wrong"}, "unavailable": {"x": "no"}, "notes": {}}
    group = {"samples": dict.fromkeys(latency.METRICS, turns), **told}
    rows = latency.rows([group], _job(), ceiling=1e9)
    assert [(row["variant"], row["refused"]) for row in rows] == [("base", "wrong"), ("PEFT", "wrong"), ("x", "no")]


def test_nothing_is_related_to_a_base_that_is_not_there() -> None:
    told = {"refused": {}, "unavailable": {"base": "it was not exported"}, "notes": {}}
    group = {"samples": {metric: {"PEFT": [[2.0]]} for metric in latency.METRICS}, **told}
    rows = latency.rows([group], _job(), ceiling=1e9)
    assert [(row["variant"], row["refused"]) for row in rows] == [
        ("PEFT", "it was not exported"),
        ("base", "it was not exported"),
    ]


def test_contenders_are_made_in_an_order_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Form] = []
    monkeypatch.setattr(latency, "_build_one", lambda form, job, prompt: made.append(form) or "none")
    orders = []
    for seed in (0, 0, 1):
        assert list(latency._build(_job(), PROMPT, random.Random(seed))) == list(RUNNERS["eager"])
        orders.append(tuple(made))
        made.clear()
    assert orders[0] == orders[1] != orders[2]
    assert set(orders[0]) == set(RUNNERS["eager"].values())


@pytest.mark.parametrize(
    "names", [("PEFT", "fused"), pytest.param(("FFBA block (fused)",), marks=pytest.mark.slow)], ids=["LoRA", "FFBA"]
)
def test_compiled_forms_agree_and_run_compiled(names: tuple[str, ...]) -> None:
    forms = {name: RUNNERS["inductor"][name] for name in names}
    contenders = {name: make_contender(form, TINY, PROMPT, 12) for name, form in forms.items()}
    following: list[Tensor] = [PROMPT[:, i : i + 1] for i in range(3)]
    assert latency._disagreements(contenders, _job("inductor"), PROMPT, following) == {}
    assert latency._not_compiled(contenders, PROMPT, PROMPT[:, :1]) == {}


@pytest.mark.slow
def test_a_runner_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    names = ("base", "PEFT", "FFBA block")
    options: dict[str, Any] = {"prompts": (4,), "new": 2, "rounds": 2, "processes": 2, "contenders": names}
    result = latency.measure(TINY, runners=("no such runner", "eager"), **options)
    failed, *rows = result["rows"]
    assert "no such runner" in failed["refused"]
    assert [row["variant"] for row in rows] == list(names)
    pictures = latency_view.draw(result, tmp_path / "latency")
    assert [file.name for file in pictures] == ["latency-4.svg", "latency-4.png"]


@pytest.mark.slow
def test_scaling_varies_one_setting_at_a_time(tmp_path: Path) -> None:
    result = scaling.measure(TINY, axes={"rank": (2, 8), "batch": (2,)}, prompt=4, new=2, rounds=2)
    floors = [
        row["tpot"]["floor"] for point in result["axes"]["rank"] for row in point["rows"] if row["variant"] == "fused"
    ]
    expected = [weights_of(Settings(shape="tiny", rank=rank), "peft").floor(1) for rank in (2, 8)]
    assert floors == expected
    sheets = scaling.sheets(result)
    assert [[row[0] for row in sheet.rows] for sheet in sheets] == [["2", "8"], ["2"]]
    assert all(len(row) == 5 for sheet in sheets for row in sheet.rows)
    svg, png = scaling.draw(result, tmp_path / "scaling")
    assert svg.read_text().lstrip().startswith("<?xml")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_one_colour_is_one_contender_and_a_picture_says_where_we_are_slower(tmp_path: Path) -> None:
    colours = latency_view.COLOURS
    assert sorted(colours.values()) == sorted(set(colours.values()))
    record = ROOT / "benchmarks" / "results"
    result = json.loads((record / "latency.json").read_text())
    told = latency_view.slower(latency_view._panels(result["rows"]))
    assert told.startswith("Slower than the fastest PEFT: fused under eager (TTFT, TPOT); ")
    assert "fused under onnxruntime (TTFT, TPOT)" in told
    assert "fused (freezing)" not in told
    svg = (record / "latency-128.svg").read_text()
    assert told in svg  # its description; what is seen is drawn as curves
    assert "prefers-color-scheme: dark" in svg
    scaled = json.loads((record / "scaling.json").read_text())
    assert "Slower than PEFT, eager: rank" in scaling._slower(scaled)
    assert scaling._slower(scaled) in (record / "scaling.svg").read_text()
