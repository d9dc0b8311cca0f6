"""The rewritten program of the target "decoder", without ONNX, in float64: it is the model, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from exported_models import build
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from flora_fx import fuse
from flora_fx.export.decoder_tracing import Unsuited, trace_decoder
from flora_fx.export.forms import DECODER_FORMS
from flora_fx.export.parts import join_heads, split_once
from flora_fx.export.rotary import ATTENTION, COS, INTERLEAVED, KEY, count_rotary
from flora_fx.export.source import private_copy, unwrap

LAYERS, VOCAB = 2, 97
SCALE, WINDOW, SOFTCAP = 11, 12, 13
"""Arguments of the operator."""


# A model in float64, throughout


class Norm(nn.Module):
    """A norm in the dtype of what it is given; transformers' own compute in float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        self.offset = 1 if "Gemma" in type(norm).__name__ else 0
        self.centered = not type(norm).__name__.endswith("RMSNorm")

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centered else x
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.weight + self.offset)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers' eager attention, whose softmax is in float32."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    return ((scores + attention_mask).softmax(-1) @ value).transpose(1, 2), None


def in_float64(name: str, **changes: Any) -> Any:
    """A model by name, with adapters inside, of which every number is a float64."""
    model: Any = private_copy(unwrap(build(name, **changes))).double()
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith(("RMSNorm", "CohereLayerNorm")):
            model.set_submodule(path, Norm(module))
    transformers.AttentionInterface.register("float64", attention)
    transformers.AttentionMaskInterface.register("float64", transformers.AttentionMaskInterface()["eager"])
    model.set_attn_implementation("float64")
    return model


# What is compared


def rewritten(model: Any) -> tuple[ExportedProgram, int]:
    """The program as it is translated, and how many attentions take q, k and v as one value."""
    program = fuse(trace_decoder(model).program, config=DECODER_FORMS)
    split_once(program)
    return program, join_heads(program)


def attentions(program: ExportedProgram) -> list[Node]:
    return list(program.graph_module.graph.find_nodes(op="call_function", target=ATTENTION))


class Rows:
    """Rows of different lengths, through a program and its keys and values."""

    def __init__(self, program: ExportedProgram, model: Any, capacity: int) -> None:
        self.module: Any = program.module(check_guards=False)
        self.model = model
        self.capacity = capacity
        self.tokens: list[list[int]] = [[], [], []]
        first = attentions(program)[0].args[3].meta["val"]  # type: ignore[union-attr]
        shape = (3, first.shape[1], capacity, first.shape[3])
        self.past = tuple(torch.full(shape, 7.0, dtype=torch.float64) for _ in range(2 * LAYERS))

    @torch.no_grad()
    def extend(self, new: list[list[int]]) -> None:
        """Run new tokens, padded on the right, and compare with the model, which runs each row on its own."""
        first = not any(self.tokens)
        width = max(map(len, new))
        for row, tokens in zip(self.tokens, new, strict=True):
            row.extend(tokens)
        lengths = torch.tensor([len(row) for row in self.tokens])
        total = width if first else max(self.capacity, int(lengths.max()))
        mask = (torch.arange(total) < lengths[:, None]).long()
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in new])
        logits, *self.past = self.module(ids, mask, tuple(self.past))
        for row, tokens, found in zip(self.tokens, new, logits, strict=True):
            wanted = self.model(torch.tensor([row])).logits[0, -len(tokens) :]
            torch.testing.assert_close(found[: len(tokens)], wanted, rtol=1e-10, atol=1e-10)


def compare(program: ExportedProgram, model: Any, capacity: int) -> None:
    """Prompts of different lengths, tokens one by one, and three at once."""
    rows = Rows(program, model, capacity)
    rows.extend([[11, 23, 5, 40, 9, 8, 7, 6], [61, 8], [3, 5, 2, 7, 1]])
    for step in range(3):
        rows.extend([[step + 4], [step + 50], [step + 90]])
    rows.extend([[10, 20, 30], [60, 50, 40], [70, 80, 90]])
    rows.extend([[1], [2], [3]])


FAMILIES = {
    # absorbed rotaries, joined heads
    "Llama": (2, 2),
    "Qwen3": (2, 0),  # norms between the projections and the rotary
    "Mistral": (2, 2),
    "Phi-3": (2, 2),
    "Gemma-2": (2, 2),
    "Cohere": (2, 2),
    "SmolLM3": (1, 2),  # a layer without positions
    "GLM": (2, 2),
    "GLM, 8": (0, 0),
    "GPT-NeoX": (2, 0),  # q, k and v of each head are neighbours
    "OPT": (0, 0),  # q is scaled
}
FAST = ("Llama", "Qwen3", "Gemma-2", "SmolLM3", "GLM, 8")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_program_is_the_model(name: str) -> None:
    model = in_float64(name)
    program, joined = rewritten(model)
    nodes = attentions(program)
    assert len(nodes) == LAYERS
    absorbed, heads = FAMILIES[name]
    assert sum(node.args[COS] is not None for node in nodes) == absorbed
    assert joined == sum(node.args[KEY] is None for node in nodes) == heads
    assert (count_rotary(program) > 0) == name.endswith(", 8")
    assert {node.args[INTERLEAVED] for node in nodes} == {name in ("Cohere", "GLM")}
    for capacity in (0, 40):  # what grows, and one buffer that stays
        compare(program, model, capacity)


# Positions


class OwnPositions(transformers.LlamaForCausalLM):
    """Counts them itself, from its cache."""

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnRotary(nn.Module):
    """Counts the positions of rotary tables from 0."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return self.inner(x, torch.arange(x.shape[1])[None] + position_ids[:, :1] * 0)


def test_positions_of_its_own_are_found_out() -> None:
    model = in_float64("Llama")
    model.__class__ = OwnPositions
    with pytest.raises(Unsuited, match="makes positions of its own"):
        trace_decoder(model)
