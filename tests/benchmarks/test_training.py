"""A training step is timed only for what trains as float64 does, and really runs compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.contenders.models import Adapted
from benchmarks.contenders.settings import Settings
from benchmarks.contenders.torch_contenders import RUNNERS, Form
from benchmarks.measure.memory import live_bytes
from benchmarks.training import training
from benchmarks.training.training import Expected, Training, disagreement, reference, sample, sheets

SETTINGS = Settings("tiny", rank=4)
TOKENS = torch.arange(12).reshape(1, 12) * 7 % 128
PEFT = RUNNERS["eager"]["PEFT"]


@pytest.fixture(scope="module")
def expected() -> Expected:
    return reference(SETTINGS, TOKENS)


def test_reference_trains_every_a_and_b(expected: Expected) -> None:
    gradients, losses, *_ = expected
    assert len(gradients) == 2 * 7 * SETTINGS.depth
    assert all(gradient is not None and gradient.dtype == torch.float64 for gradient in gradients.values())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(("adapted", "count"), [("ffba-block", 4), ("ffba-shared", 9)])
def test_ffba_trains_every_a_and_b_as_its_own_reference_does(adapted: Adapted, count: int, expected: Expected) -> None:
    own = reference(SETTINGS, TOKENS, adapted)
    assert len(own.gradients) == count * SETTINGS.depth
    assert disagreement(Training(Form(adapted, "eager"), SETTINGS, TOKENS), own) is None
    assert abs(own.losses[0] - expected.losses[0]) > 10 * expected.losses[0] * own.allowed_loss


def test_peft_agrees_with_float64_and_its_base_stays(expected: Expected) -> None:
    peft = Training(PEFT, SETTINGS, TOKENS)
    assert disagreement(peft, expected) is None
    assert not any(weight.grad is not None for weight in peft.adapters.values())
    trained = {id(weight) for group in peft.optimizer.param_groups for weight in group["params"]}
    assert trained == {id(weight) for weight in peft.adapters.values()}


def test_wrong_gradient_is_refused(expected: Expected) -> None:
    wrong = Training(PEFT, SETTINGS, TOKENS)
    name, weight = next(iter(wrong.adapters.items()))
    weight.register_hook(lambda gradient: gradient * 1.01)
    assert str(disagreement(wrong, expected)).startswith(f"the gradient of {name} is off by 1.0e-02")


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_gradient_that_is_no_number_or_zero_is_refused(expected: Expected, value: float) -> None:
    wrong = Training(PEFT, SETTINGS, TOKENS)
    *_, (name, weight) = wrong.adapters.items()
    weight.register_hook(lambda gradient: torch.full_like(gradient, value))
    assert f"the gradient of {name} is off" in str(disagreement(wrong, expected))


def test_missing_gradient_is_refused(expected: Expected) -> None:
    wrong = Training(PEFT, SETTINGS, TOKENS)
    name, weight = next(iter(wrong.adapters.items()))
    weight.requires_grad_(False)
    assert disagreement(wrong, expected) == f"1 of 28 A and B get no gradient, {name} among them"


def test_step_that_does_not_reach_the_weights_is_refused(expected: Expected) -> None:
    stale = Training(PEFT, SETTINGS, TOKENS)
    stale.optimizer.param_groups[0]["lr"] = 0.0
    assert "its loss at step 2 is" in str(disagreement(stale, expected))


def test_in_bfloat16_rounding_is_allowed_and_no_fault() -> None:
    """As far as the live model's own. A gradient twice as large, or an optimizer that does nothing, is farther off."""
    settings = Settings("tiny", rank=4, dtype="bfloat16")
    tokens = torch.arange(64).reshape(1, 64) * 7 % 128
    expected = reference(settings, tokens)
    assert expected.allowed > 100 * training.GRADIENT_FLOOR
    assert disagreement(Training(PEFT, settings, tokens), expected) is None
    wrong, stale = (Training(PEFT, settings, tokens) for _ in range(2))
    next(iter(wrong.adapters.values())).register_hook(lambda gradient: gradient * 2)
    stale.optimizer.param_groups[0]["lr"] = 0.0
    assert "the gradient of" in str(disagreement(wrong, expected))
    assert "its loss at step" in str(disagreement(stale, expected))


def test_training_that_changes_nothing_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LEARNING_RATE", 1e-9)
    with pytest.raises(RuntimeError, match="a check could not tell whether a variant trains"):
        reference(SETTINGS, TOKENS)


@pytest.mark.slow
def test_rows_of_what_trains_and_of_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PEFT", "fused", "fused (flora backend)", "FFBA block")
    monkeypatch.setattr(training, "VARIANTS", {name: training.VARIANTS[name] for name in names})
    seen: list[tuple[int, int]] = []
    rows = {row["variant"]: row for row in sample(SETTINGS, 3, 12, lambda done, total: seen.append((done, total)))}
    assert seen == [(done + 1, 7) for done in range(7)]
    assert list(rows) == list(names)
    assert rows["PEFT"]["ratio"] == 1
    assert rows["FFBA block"]["ffba"] == {"placement": "block", "rank": 17}
    for row in rows.values():
        assert ("ratio" in row) != ("unavailable" in row), row
        assert ("peak_bytes" in row) == ("ratio" in row)
    if "unavailable" in rows["fused"]:
        assert rows["fused"]["unavailable"].startswith("TieError: ")
    before = live_bytes("cpu")
    peft = Training(PEFT, SETTINGS, TOKENS)
    peft.step()
    held = live_bytes("cpu") - before  # weights and the two moments
    gradients = sum(weight.nbytes for weight in peft.adapters.values())
    assert held + gradients < rows["PEFT"]["peak_bytes"] < 3 * held  # activations too
    result = {"settings": {"batch": 1}, "sequence": 12, "rounds": 3, "rows": list(rows.values())}
    [sheet] = sheets(result)
    assert [row[0] for row in sheet.rows] == list(names)
    assert len(sheet.notes) == 1 + sum("ratio" not in row for row in rows.values())
    assert "rank 17" in sheet.notes[-1]


def test_no_ratio_without_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "VARIANTS", {"PEFT": PEFT, "again": PEFT})
    verdicts: Any = iter(["it is wrong", None])
    monkeypatch.setattr(training, "reference", lambda *_: Expected({}, []))
    monkeypatch.setattr(training, "disagreement", lambda *_: next(verdicts))
    first, second = sample(SETTINGS, 2, 12, lambda done, total: None)
    assert first == {"variant": "PEFT", "refused": "it is wrong"}
    assert "ratio" not in second
    assert "PEFT" in second["refused"]


def test_compiled_variant_that_runs_eager_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "VARIANTS", {"PEFT": PEFT, "PEFT (inductor)": RUNNERS["inductor"]["PEFT"]})
    with torch.compiler.set_stance("force_eager"):
        peft, compiled = sample(SETTINGS, 2, 12, lambda done, total: None)
    assert peft["ratio"] == 1
    assert compiled["refused"] == "a profile shows that it did not run compiled"


def test_compilation_while_the_clock_runs_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "VARIANTS", {"PEFT": PEFT})
    compiled = iter(range(2))
    monkeypatch.setattr(training, "reference", lambda *_: Expected({}, []))
    monkeypatch.setattr(training, "disagreement", lambda *_: None)
    monkeypatch.setattr(training, "compilations", lambda: next(compiled))
    [row] = sample(SETTINGS, 2, 12, lambda done, total: None)
    assert row["refused"] == "something was compiled while the clock ran"
    assert "ratio" not in row


def test_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        training.measure(Settings("tiny", dtype="float16"))
