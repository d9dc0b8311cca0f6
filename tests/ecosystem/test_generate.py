"""transformers' generate through the backend: PEFT's tokens, and nothing is compiled once tokens come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters

from flora_fx import backend
from tests.architectures import lora_model

EXACT = {"flora.inner": "aot_eager"}
IDS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[0, :2] = 0  # prompts differ in length
NEW = 6


class Compilations(transformers.LogitsProcessor):
    """How many graphs had been compiled when each token was chosen."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(counters["stats"]["unique_graphs"])
        return scores


def generate(model: Any, length: int = 7, **options: Any) -> tuple[Tensor, list[int]]:
    """The tokens, and how many graphs had been compiled for each of them."""
    told = Compilations()
    tokens = model.generate(
        input_ids=IDS[:, :length],
        attention_mask=MASK[:, :length],
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
        cache_implementation="static",
        max_cache_len=24,
        logits_processor=[told],
        **options,
    )
    return tokens, told.seen


def asked(**options: Any) -> transformers.CompileConfig:
    """What makes transformers compile, here on a CPU, too."""
    found = transformers.CompileConfig(backend="flora", mode=None, options=EXACT | options)
    found._compile_all_devices = True
    return found


@pytest.fixture(autouse=True)
def _counted_from_zero() -> None:
    counters.clear()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_transformers_compiles_the_decode_step_once(name: str) -> None:
    model = lora_model(name).double()
    expected = {length: generate(model, length)[0] for length in (7, 5)}
    config = asked()
    for first, length in ((0, 7), (1, 7), (1, 5)):
        tokens, seen = generate(model, length, compile_config=config)
        assert torch.equal(tokens, expected[length])
        assert seen == [first, *[1] * (NEW - 1)]
    report = backend.last_report()
    assert report is not None
    assert len(report.fused) == 14


def test_a_model_compiled_in_place_takes_prompts_too() -> None:
    model = lora_model("llama").double()
    expected, none = generate(model)
    assert none == [0] * NEW
    model.get_base_model().compile(backend="flora", options=EXACT)
    for first in (1, 2):
        # A compile_config is there, and is not followed: the model would be compiled twice.
        tokens, seen = generate(model, compile_config=asked(), disable_compile=True)
        assert torch.equal(tokens, expected)
        assert seen == [first, *[2] * (NEW - 1)]


@pytest.mark.parametrize(("name", "form"), [("llama", "unrolled"), ("gpt2", "addmm")])
def test_weights_that_move_are_traced_once_more_at_the_next_token(name: str, form: str) -> None:
    model = lora_model(name).double()
    expected, _ = generate(model)
    config = asked(**{"flora.accumulate": form})
    for seen_then in ([0, 1, *[2] * (NEW - 2)], [2] * NEW):
        tokens, seen = generate(model, compile_config=config)
        assert torch.equal(tokens, expected)
        assert seen == seen_then


def test_adapters_stay_live_between_tokens() -> None:
    model = lora_model("llama").double()
    config = asked()
    before, _ = generate(model, compile_config=config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-3)
    expected, _ = generate(model)
    tokens, seen = generate(model, compile_config=config)
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, before)
    assert seen == [1] * NEW


def test_the_documented_config_is_one_that_the_backend_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mode is transformers' own: for CUDA graphs, which a CPU does without."""
    told: list[str | None] = []

    def compiler(inner: str, mode: str | None, options: dict[str, object]) -> object:
        told.append(mode)
        return lambda graph, inputs: graph

    monkeypatch.setattr(backend, "_compiler", compiler)
    model = lora_model("llama")
    config = transformers.CompileConfig(backend="flora")
    config._compile_all_devices = True
    expected, _ = generate(model)
    tokens, _ = generate(model, compile_config=config)
    assert torch.equal(tokens, expected)
    assert told == ["reduce-overhead"]
