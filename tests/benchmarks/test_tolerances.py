"""A right contender passes and a wrong one is refused, at every dtype and prompt length; references are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import references
from benchmarks.contenders.contender import Contender
from benchmarks.contenders.models import Adapted, make_model
from benchmarks.contenders.settings import Settings
from benchmarks.contenders.step import CachedStep, empty_cache
from benchmarks.contenders.torch_contenders import TorchContender
from benchmarks.latency import latency
from benchmarks.measure.kept import once
from benchmarks.measure.tolerances import Reference, verdict

LAST = ".layers.1."

Change = Callable[[Any], None]


def _settings(dtype: str) -> Settings:
    return Settings("tiny", rank=4, threads=1, dtype=dtype)


def _text(length: int) -> tuple[Tensor, list[Tensor]]:
    tokens = torch.randint(128, (1, length + 4), generator=torch.Generator().manual_seed(3))
    return tokens[:, :length], list(tokens[:, length:].split(1, dim=1))


@torch.no_grad()
def _contender(settings: Settings, length: int, adapted: Adapted, change: Change = lambda model: None) -> Contender:
    model = make_model(settings, adapted)
    change(model)
    step = CachedStep(model).eval()
    return TorchContender(step, step, empty_cache(settings, length + 4), compiled=False)


def _other_attention(model: Any) -> None:
    """Spelled out: the same, rounded at other places."""
    getattr(model, "get_base_model", lambda: model)().set_attn_implementation("eager")


def _weights(model: Any, *names: str) -> list[Tensor]:
    return [w for name, w in model.named_parameters() if LAST in name and any(part in name for part in names)]


def _stronger(*names: str) -> Change:
    """5% stronger, in the last layer, which rounding hides most."""

    def change(model: Any) -> None:
        for weight in _weights(model, *names):
            weight.mul_(1.05)

    return change


def _slices_swapped(model: Any) -> None:
    keys, values = _weights(model, "k_proj.lora_B", "v_proj.lora_B")
    keys.copy_(values), values.copy_(keys.clone())


def _scale_forgotten(model: Any) -> None:
    model.base_model.model.model.layers[1].mlp.down_proj.scaling["default"] = 1.0


CASES = [("float32", 8), ("float16", 8), ("float16", 500), ("bfloat16", 8), ("bfloat16", 300)]


@pytest.mark.parametrize(("dtype", "length"), CASES)
def test_right_ones_pass_and_wrong_ones_do_not(dtype: str, length: int) -> None:
    settings, (prompt, following) = _settings(dtype), _text(length)
    job = latency.Job(settings, "eager", length, 4, 1)

    def judged(**contenders: tuple[Adapted, Change]) -> dict[str, str]:
        names = {"plain": "PEFT", "captured": "PEFT (captured)"}  # all of one model
        made = {names.get(name, name): _contender(settings, length, *how) for name, how in contenders.items()}
        return latency._disagreements(made, job, prompt, following)

    right = {name: (adapted, _other_attention) for name, adapted in (("base", "base"), ("merged", "merged"))}
    assert judged(plain=("peft", _other_attention), **right) == {}  # type: ignore[arg-type]
    wrong = judged(
        base=("base", _stronger("o_proj.weight", "down_proj.weight")),
        plain=("peft", _stronger("lora_B")),
        captured=("peft", _slices_swapped),
        fused=("peft", _scale_forgotten),
    )
    assert sorted(wrong) == ["PEFT", "PEFT (captured)", "base", "fused"]
    assert all("float64 reference" in why for why in wrong.values())


def test_half_precision_at_a_long_prompt_is_refused_by_no_constant() -> None:
    """A model whose own rounding is large may be that far off; in another one the same distance is a fault."""
    right = [torch.ones(1, 100, dtype=torch.float64)]
    found = [1.03 * right[0]]
    assert verdict(found, Reference(right, error=0.02)) is None
    assert verdict(found, Reference(right, error=0.001)) == (
        "its logits are off by 3.0e-02 of the float64 reference; 5.0e-03 is allowed"
    )
    assert verdict([right[0] * float("nan")], Reference(right, error=0.02)) is not None


def test_a_layer_is_named() -> None:
    right = [torch.ones(1, 100, dtype=torch.float64)]
    pulls = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    found = [right[0] + 0.05 * right[0].norm() * (pulls[0] * 0.1 - pulls[2])]
    why = verdict(found, Reference(right, pulls, error=1.0))
    assert why == "layer 2 acts 5.0% too weakly for the float64 reference; 2.5% is allowed"
    with pytest.raises(RuntimeError, match=r"act 2\.0% stronger or weaker: a check could not tell"):
        verdict(found, Reference(right, pulls, error=1.0, strength=0.02))


def test_rotary_frequencies_are_not_rounded() -> None:
    """As a checkpoint is loaded, and as exporters that compute them have them."""
    frequencies = [make_model(_settings(dtype), "base").model.rotary_emb.inv_freq for dtype in ("float32", "float16")]
    assert frequencies[1].dtype == torch.float32
    torch.testing.assert_close(*frequencies, rtol=0, atol=0)


def test_a_reference_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, following = _text(8)
    first = references.known(_settings("float16"), "peft", prompt, following, tmp_path)
    assert first.pulls is not None
    assert first.pulls.shape == (2, 5 * 128)
    other = references.known(_settings("float16"), "peft", prompt[:, 1:], following, tmp_path)
    assert other.error != first.error
    monkeypatch.setattr(references, "_compute", None)
    again = references.known(_settings("float16"), "peft", prompt, following, tmp_path)
    assert (again.error, again.strength, again.allowed) == (first.error, first.strength, first.allowed)
    for one, same in zip(first.logits, again.logits, strict=True):
        assert torch.equal(one, same)
    with pytest.raises(TypeError):
        references.known(_settings("float32"), "peft", prompt, following, tmp_path)


def test_nothing_half_written_is_read(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        once(tmp_path, "key", fails)
    assert once(tmp_path, "key", lambda: {"a": 1}) == {"a": 1}
    assert once(tmp_path, "key", fails) == {"a": 1}
    assert len([*tmp_path.iterdir()]) == 1
