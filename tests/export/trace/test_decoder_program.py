"""The rewritten program of the target "decoder", without ONNX, in float64: it is the model, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from flora_fx import fuse
from flora_fx.adapters import FloraConfig
from flora_fx.adapters.config import Placement
from flora_fx.export.forms import DECODER_FORMS
from flora_fx.export.rewrite.rotary import ATTENTION, COS, INTERLEAVED, KEY, count_rotary
from flora_fx.export.rewrite.splits import join_heads, split_once
from flora_fx.export.trace.decoder import trace_decoder
from flora_fx.export.trace.model import private_copy, unwrap
from flora_fx.export.trace.refusals import Unsuited
from tests.export.exported_models import build, plain

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


def in_float64(name: str) -> Any:
    """A model by name, with adapters inside, of which every number is a float64."""
    return exactly(unwrap(build(name)))


def exactly(core: nn.Module) -> Any:
    """A copy of a model, of which every number is a float64."""
    model: Any = private_copy(core).double()
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

    def __init__(self, program: ExportedProgram, model: Any, capacity: int, tolerance: float) -> None:
        self.module: Any = program.module(check_guards=False)
        self.model = model
        self.capacity = capacity
        self.tolerance = tolerance
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
            torch.testing.assert_close(found[: len(tokens)], wanted, rtol=self.tolerance, atol=self.tolerance)


def compare(program: ExportedProgram, model: Any, capacity: int, tolerance: float) -> None:
    """Prompts of different lengths, tokens one by one, and three at once."""
    rows = Rows(program, model, capacity, tolerance)
    rows.extend([[11, 23, 5, 40, 9, 8, 7, 6], [61, 8], [3, 5, 2, 7, 1]])
    for step in range(3):
        rows.extend([[step + 4], [step + 50], [step + 90]])
    rows.extend([[10, 20, 30], [60, 50, 40], [70, 80, 90]])
    rows.extend([[1], [2], [3]])


@dataclass(frozen=True)
class Expected:
    """What a family's program holds.

    Attributes:
        absorbed: attentions that rotate.
        joined: attentions that take q, k and v as one value.
        scale, windows, softcap: of the attentions.
        interleaved: whether neighbours are rotated together.
        outside: whether rotary positions are computed outside of the attention.
        tolerance: to the model in float64.
    """

    absorbed: int = LAYERS
    joined: int = LAYERS
    scale: float = 0.25
    windows: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    interleaved: bool = False
    outside: bool = False
    tolerance: float = 1e-10


FAMILIES = {
    "Llama": Expected(),
    "Qwen3": Expected(joined=0, scale=32**-0.5),  # norms between the projections and the rotary
    "Mistral": Expected(windows=(6, 6)),
    "Phi-3": Expected(),
    "Gemma-2": Expected(windows=(6, -1), scale=24**-0.5, softcap=12.0),
    "Granite": Expected(scale=0.2),
    "Cohere": Expected(interleaved=True, tolerance=1e-6),  # rotates in float32
    "SmolLM3": Expected(absorbed=1),  # a layer without positions
    "GLM": Expected(interleaved=True, scale=32**-0.5),
    "GLM, 8": Expected(absorbed=0, joined=0, outside=True),
    "GPT-NeoX": Expected(joined=0, scale=32**-0.5),  # q, k and v of each head are neighbours
    "OPT": Expected(absorbed=0, joined=0, scale=1.0),  # q is scaled before
}
FAST = ("Llama", "Qwen3", "Gemma-2", "GLM, 8")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_program_is_the_model(name: str) -> None:
    model, expected = in_float64(name), FAMILIES[name]
    program, joined = rewritten(model)
    nodes = attentions(program)
    assert len(nodes) == LAYERS
    assert sum(node.args[COS] is not None for node in nodes) == expected.absorbed
    assert joined == sum(node.args[KEY] is None for node in nodes) == expected.joined
    assert {node.args[SCALE] for node in nodes} == {expected.scale}
    assert tuple(node.args[WINDOW] for node in nodes) == expected.windows
    assert {node.args[SOFTCAP] for node in nodes} == {expected.softcap}
    assert {node.args[INTERLEAVED] for node in nodes if node.args[COS] is not None} <= {expected.interleaved}
    assert (count_rotary(program) > 0) == expected.outside
    for capacity in (0, 40):  # keys and values that grow, and in one buffer that stays
        compare(program, model, capacity, expected.tolerance)


@pytest.mark.parametrize("placement", ["shared", pytest.param("block", marks=pytest.mark.slow)])
def test_the_program_with_ffba_is_the_model(placement: Placement) -> None:
    adapters = FloraConfig(r=5, alpha=7, placement=placement, init="random")
    model = exactly(unwrap(peft.get_peft_model(plain("Llama"), adapters)))
    program, joined = rewritten(model)
    assert joined == LAYERS
    compare(program, model, 0, 1e-10)


# Positions


class OwnPositions(transformers.LlamaForCausalLM):
    """Counts them itself, from its cache."""

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_positions_of_its_own_are_found_out() -> None:
    model = in_float64("Llama")
    model.__class__ = OwnPositions
    with pytest.raises(Unsuited, match="makes positions of its own"):
        trace_decoder(model)
