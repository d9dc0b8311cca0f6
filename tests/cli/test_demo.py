"""The demo runs end to end; its parts measure and draw what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import flora_fx.export
from flora_fx import cli, demo
from flora_fx.demo import quantized
from flora_fx.demo.step import CachedStep
from flora_fx.demo.text import prose, zen
from flora_fx.demo.train import Recipe, build_tokenizer, train_base
from tests.quiet_sessions import noted

from .conftest import llama


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other tests' processes, two threads wait for each other for longer than they work."""
    monkeypatch.setattr(demo, "THREADS", 1)
    monkeypatch.setattr(quantized, "_THREADS", 1)


def test_fast_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = noted(monkeypatch, flora_fx.export)
    result = CliRunner().invoke(cli.build_app(), ["demo", "--output", str(tmp_path), "--fast", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told == json.loads((tmp_path / "demo.json").read_text())
    for name in (
        "graph.svg",
        "latency.svg",
        "latency.png",
        "base/config.json",
        "adapter/adapter_config.json",
    ):
        assert (tmp_path / name).stat().st_size > 0
    assert all(error["max_rel"] < 1e-5 for error in told["verification"].values())
    assert all(text["onnx"] == text["adapter"] for text in told["texts"])
    assert set(told["latency"]) == {"PyTorch", "ONNX Runtime"}
    declined = [
        json.loads((tmp_path / "onnx" / name / "flora_fx.json").read_text())["fusion"]["declines"]
        for name in told["onnx"]
    ]
    assert [len(declines) > 0 for declines in declined] == [name == "unmerged" for name in told["onnx"]]
    assert quiet == [True] * 4, "a session's threads would take the time of the next one"
    for phases in told["latency"].values():
        assert {"base", "unmerged", "fused", "merged"} <= set(phases["TTFT"])
        assert set(phases["TTFT"]) == set(phases["TPOT"])


@pytest.mark.slow
def test_fast_demo_over_a_base_in_few_bits(tmp_path: Path) -> None:
    """Without ``--json``, so that what is told to people is told."""
    result = CliRunner().invoke(cli.build_app(), ["demo", "--output", str(tmp_path), "--fast", "--quantized"])
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "demo.json").read_text())["quantized"]
    live, merged, again = (told[name] for name in ("live", "merged in float", "merged, 4 bits again"))
    assert live["texts"] == merged["texts"]
    assert live["right"] == merged["right"]
    assert live["bytes"] < 0.6 * merged["bytes"], "the embedding is in float32 in both"
    assert max(live["max_rel_error"], merged["max_rel_error"]) < 1e-4
    assert again["bytes"] < live["bytes"]
    assert "MatMulNBits" in live["notes"][-1]
    assert "Beautiful is" in result.stdout


def test_texts_differ_and_are_plain() -> None:
    assert len(prose()) > 100_000
    assert len(zen().splitlines()) == 19
    assert zen().endswith("let's do more of those!\n")
    assert "Beautiful is better" not in prose()


def test_training_lowers_the_loss_and_repeats(tmp_path: Path) -> None:
    text = zen()
    tokenizer = build_tokenizer([text], tmp_path, vocabulary=300)
    recipe = Recipe(steps=12, batch=2, length=16, learning_rate=3e-3)
    ticks: list[tuple[int, int]] = []
    losses = [
        train_base(text, tokenizer, tmp_path / name, recipe, lambda *tick: ticks.append(tick), seed=3)
        for name in ("one", "two")
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert ticks[:12] == [(step, 12) for step in range(1, 13)]


def test_cached_step_equals_the_whole_sequence() -> None:
    model = llama().eval()
    step = CachedStep(model)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        _, *past = step(tokens[:, :5])
        logits, *present = step(tokens[:, 5:], *past)
        whole = model(tokens).logits[:, -1:]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)
    assert [tuple(state.shape) for state in present] == [(1, 2, 6, 8)] * 4
