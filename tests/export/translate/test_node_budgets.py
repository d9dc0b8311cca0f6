"""How many nodes a decoder's graph has, of which kinds, and that no weight is in the file twice.

Sizes are tiny: counts do not depend on them, as the slow test shows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import onnx
import peft
import pytest
import torch
import transformers
from torch import nn

from flora_fx.adapters import FloraConfig
from flora_fx.export import export_onnx, exporting
from flora_fx.export.forms import stacked_forms

LAYERS, RANK = 2, 5
TINY = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1}
SMOLLM = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
Kind = Literal["base", "LoRA", "LoRA, hot swap", "block", "shared"]

FIXED = {
    **{"Gather": 1, "SimplifiedLayerNormalization": 1, "Transpose": 1, "MatMul": 1},  # embedding, first norm, head
    **{"ReduceSum": 1, "Sub": 1, "Shape": 1, "Squeeze": 1, "Cast": 2},  # lengths of the rows, length of the mask
}
LAYER = {
    "MatMul": 4,  # qkv, o, gate and up, down
    "GroupQueryAttention": 1,
    "SkipSimplifiedLayerNormalization": 2,
    "Split": 1,  # gate, up
    "QuickGelu": 1,
    "Mul": 1,
}
PER_LAYER: dict[Kind, dict[str, int]] = {
    "base": LAYER,
    "LoRA": {**LAYER, "MatMul": 8, "Concat": 4},  # z = A x; [W, B] [x; z]
    "LoRA, hot swap": {**LAYER, "MatMul": 12, "Add": 4},  # z = A x; W x + B z
    "block": {**LAYER, "Split": 2, "Concat": 2},  # [W; A] x; [W, B] [u; z]
    "shared": {**LAYER, "MatMul": 6, "Concat": 4},  # z = A x; [W, B] [x; z]; [W, B] [u; z]
}
BUDGETS: dict[Kind, int] = {"base": 52, "LoRA": 84, "LoRA, hot swap": 100, "block": 64, "shared": 74}
"""Of a whole graph of 4 layers. onnxruntime-genai's builder writes 56 without an adapter, and 148 with LoRA."""


def llama(kind: Kind, sizes: dict[str, int], layers: int) -> nn.Module:
    config = transformers.LlamaConfig(
        **sizes,
        vocab_size=97,
        num_hidden_layers=layers,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms that are equal would be one
                parameter.normal_(1, 0.1)
    if kind == "base":
        return model
    if kind in ("block", "shared"):
        return peft.get_peft_model(model, FloraConfig(r=RANK, placement=kind, init="random"))
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False))


@dataclass(frozen=True)
class Export:
    """A model and its export."""

    model: nn.Module
    directory: Path

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(str(self.directory / "model.onnx"), load_external_data=False).graph

    @property
    def ops(self) -> Counter[str]:
        return Counter(node.op_type for node in self.graph.node)

    def nodes(self, op: str) -> Iterator[onnx.NodeProto]:
        return (node for node in self.graph.node if node.op_type == op)


class Get(Protocol):
    def __call__(self, kind: Kind) -> Export: ...


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Each graph is exported when it is first asked for."""
    known: dict[Kind, Export] = {}
    root = tmp_path_factory.mktemp("budgets")

    def get(kind: Kind) -> Export:
        if kind not in known:
            model = llama(kind, TINY, LAYERS)
            export_onnx(model, root / kind, hot_swap=kind == "LoRA, hot swap")
            known[kind] = Export(model, root / kind)
        return known[kind]

    return get


def expected(kind: Kind, layers: int) -> Counter[str]:
    ops = Counter(FIXED)
    for op, count in PER_LAYER[kind].items():
        ops[op] += count * layers
    return ops


@pytest.mark.parametrize("kind", PER_LAYER)
def test_nodes(export: Get, kind: Kind) -> None:
    assert export(kind).ops == expected(kind, LAYERS), "no Reshape, Transpose or Expand in a layer"
    assert sum(expected(kind, 4).values()) <= BUDGETS[kind]


@pytest.mark.parametrize("kind", ["LoRA", "LoRA, hot swap"])
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "CPUExecutionProvider"])
def test_several_adapters_are_one_node_a_pack_more(
    tmp_path: Path, kind: Kind, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU each B has a GEMM of its own instead of zeros, which is faster there."""
    monkeypatch.setattr(exporting, "stacked_forms", lambda forms, _: stacked_forms(forms, provider))
    model: Any = llama("LoRA", TINY, LAYERS)
    model.add_adapter("other", peft.LoraConfig(r=RANK - 2, target_modules="all-linear", init_lora_weights=False))
    export_onnx(model, tmp_path / "out", adapters=["default", "other"], hot_swap=kind == "LoRA, hot swap")
    once = {"Unsqueeze": 1, "Equal": 3}  # the ids, and masks of one, two and three projections
    found, wanted = Export(model, tmp_path / "out").ops, expected(kind, LAYERS) + Counter({**once, "Where": 4 * LAYERS})
    if provider == "CPUExecutionProvider":
        assert found["MatMul"] == 1 + (4 + 4 + 7) * LAYERS  # the head; bases, A's, B's
        assert "Concat" not in found  # nor [W, B]: a B that is an input of the graph, or one of many, stands alone
        for op in ("MatMul", "Split", "Add", "Concat"):
            found.pop(op, 0)
            wanted.pop(op, 0)
    assert found == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", PER_LAYER)
def test_nodes_of_four_layers_of_smollm_135m(tmp_path: Path, kind: Kind) -> None:
    model = llama(kind, SMOLLM, 4)
    export_onnx(model, tmp_path / "out", hot_swap=kind == "LoRA, hot swap")
    ops = Export(model, tmp_path / "out").ops
    assert ops == expected(kind, 4)
    assert sum(ops.values()) <= BUDGETS[kind]


@pytest.mark.parametrize("kind", PER_LAYER)
def test_lengths_and_tables_are_there_once(export: Get, kind: Kind) -> None:
    attentions = list(export(kind).nodes("GroupQueryAttention"))
    packed, key, value, _, _, *shared = zip(*(node.input for node in attentions), strict=True)
    assert len(set(packed)) == LAYERS
    assert {*key, *value} == {""}, "q, k and v are one value"
    assert all(len(set(names)) == 1 for names in shared), "seqlens_k, total_sequence_length, cos and sin"
    assert all(onnx.helper.get_node_attr_value(node, "do_rotary") == 1 for node in attentions)
    inputs = {name for node in export(kind).graph.node for name in node.input}
    masks = [node.op_type for node in export(kind).graph.node if "attention_mask" in node.input]
    assert sorted(masks) == ["ReduceSum", "Shape"]
    assert "input_ids" in inputs


@pytest.mark.parametrize("kind", PER_LAYER)
def test_every_weight_is_in_the_file_once(export: Get, kind: Kind) -> None:
    made = export(kind)
    (embedding,) = [node.input[0] for node in made.nodes("Gather")]
    assert [node.input[0] for node in made.nodes("Transpose")] == [embedding], "tied"
    weights = [t for t in made.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    stored = sum(math.prod(t.dims) for t in weights)
    unique = sum(p.numel() for p in made.model.parameters())
    tables = 2 * 64 * 8
    width, qkv, wide = 48, (3 + 1 + 1) * 16, 2 * 80
    zeros = {
        "LoRA": RANK * (2 * qkv + wide),  # a B is block-diagonal: three blocks, and two
        "LoRA, hot swap": RANK * (2 * qkv + wide),
        "block": (-(qkv + RANK) % 16 + -(wide + RANK) % 16) * width,  # rows that fill a pack up
    }
    assert stored == unique + tables + LAYERS * zeros.get(kind, 0)
    lengths = [int(e.value) for t in made.graph.initializer for e in t.external_data if e.key == "length"]
    assert (made.directory / "model.onnx.data").stat().st_size == sum(lengths)
