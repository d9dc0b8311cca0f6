"""Dynamic NTK scaling: frequencies follow the length of the text, and the general route follows them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flora_fx.export import Decoder, export_onnx, load
from flora_fx.export.trace.model import unwrap
from flora_fx.export.trace.stateless_rope import forget_lengths
from tests.export.exported_models import build, plain

MOST = 16
ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.7}
IDS = torch.tensor([[0, 0, 11, 23, 5], [7, 3, 61, 8, 40]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def embedding(kind: str) -> tuple[Any, dict[str, str]]:
    """A rotary embedding, and how it is called besides."""
    size: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": MOST}
    if kind == "one":
        return LlamaRotaryEmbedding(transformers.LlamaConfig(**size, rope_parameters=ROPE)), {}
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": ROPE}
    config = transformers.Gemma3TextConfig(**size, head_dim=16, rope_parameters=ropes)
    return Gemma3RotaryEmbedding(config), {"layer_type": kind}


@pytest.mark.parametrize("kind", ["one", "full_attention", "sliding_attention"])
def test_rows_are_those_of_a_text_that_grows(kind: str) -> None:
    module, named = embedding(kind)
    model = torch.nn.Module()
    model.rope = copy.deepcopy(module)
    assert forget_lengths(model)
    x, changed = torch.zeros(1), False
    for length in (3, MOST - 1, MOST, MOST + 1, MOST + 2, 3 * MOST, 5):
        positions = torch.stack([torch.arange(length), torch.arange(length) * 0])  # one row is short
        expected = copy.deepcopy(module)(x, positions, **named)
        found = model.rope(x, positions, **named)
        assert all(map(torch.equal, found, expected))
        frozen = model.rope.module(x, positions, **named)
        changed |= not torch.equal(frozen[0], found[0])
    assert changed == (kind != "sliding_attention")


def test_other_rotary_embeddings_stay() -> None:
    model = plain("Llama-3")
    before = [type(module) for module in model.modules()]
    assert not forget_lengths(model)
    assert [type(module) for module in model.modules()] == before


def by_pytorch(model: Any, **options: Any) -> Tensor:
    """By a copy, which has seen no text before."""
    core = copy.deepcopy(unwrap(model)).eval()
    core.generation_config.eos_token_id = None
    tokens: Tensor = core.generate(IDS, attention_mask=MASK, do_sample=False, pad_token_id=0, **options)  # type: ignore[operator]
    return tokens


def test_greedy_tokens_beyond_the_models_own_length(tmp_path: Path) -> None:
    model = build("Llama", max_position_embeddings=MOST, rope_parameters=ROPE)
    expected = by_pytorch(model, max_new_tokens=40)
    default = build("Llama", max_position_embeddings=MOST, rope_parameters={**ROPE, "rope_type": "default"})
    other = by_pytorch(default, max_new_tokens=40)
    assert torch.equal(other[:, :MOST], expected[:, :MOST])
    assert not torch.equal(other, expected), "the frequencies must matter for this to mean anything"

    result = export_onnx(model, tmp_path / "out")
    why = "exported by the general route: its rotary positions are dynamic: they depend on the length of the sequence"
    assert (result.target, result.notes) == ("general", (why,))
    assert json.loads((tmp_path / "out" / "flora_fx.json").read_text())["max_positions"] == 0
    decoder = load(tmp_path / "out")
    assert isinstance(decoder, Decoder)
    assert torch.equal(decoder.generate(IDS, MASK, max_new_tokens=40, eos_token_id=[]), expected)
