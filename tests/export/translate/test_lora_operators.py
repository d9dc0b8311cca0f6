"""A decoder in the operators of ``flora_ort``: its nodes, that it computes the same, and what is left alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import peft
import pytest
import torch
import transformers
from torch import nn

from flora_fx.export import Decoder, ExportResult, export_onnx, load
from flora_fx.export.directory.manifest import read_manifest
from flora_fx.export.translate.lora_operators import use_lora_operators
from flora_fx.fusing import fuse, report

LAYERS = 2
SIZES: dict[str, Any] = {
    **{"vocab_size": 97, "num_hidden_layers": LAYERS, "max_position_embeddings": 64, "hidden_size": 48},
    **{"intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1},
}
RANKS = {"r": 5, "lora_alpha": 7, "rank_pattern": {"v_proj": 3, "down_proj": 8}}
pytestmark = pytest.mark.usefixtures("library")

Make = Callable[[], nn.Module]


def adapted(model: nn.Module, targets: str | list[str] = "all-linear") -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.1)
    return peft.get_peft_model(
        model.eval(),  # type: ignore[arg-type]
        peft.LoraConfig(**RANKS, target_modules=targets, init_lora_weights=False),
    )


def llama(targets: str | list[str] = "all-linear") -> nn.Module:
    return adapted(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), targets)


def qwen3() -> nn.Module:
    return adapted(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16)))


def qwen2() -> nn.Module:
    """Its q, k and v have biases."""
    return adapted(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)), ["q_proj", "v_proj", "up_proj"])


def gemma3() -> nn.Module:
    """Norms of 1 + gamma, behind projections too; heads that are normalised; GELU."""
    return adapted(transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, head_dim=16)))


def two() -> nn.Module:
    """Two adapters are active, not everywhere both."""
    model: Any = llama()
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model  # type: ignore[no-any-return]


LAYER = {"MatMul": 4, "LoraAdd": 1, "GroupQueryAttention": 1, "LoraSwiGLU": 1, "LoraSkipRMSNorm": 2}
CASES: dict[str, tuple[Make, dict[str, int]]] = {
    "llama": (llama, LAYER),
    "two adapters": (two, LAYER),
    "q and v": (
        lambda: llama(["q_proj", "v_proj"]),
        {
            **{"MatMul": 4, "LoraAdd": 1, "GroupQueryAttention": 1, "SkipSimplifiedLayerNormalization": 2},
            **{"Split": 1, "QuickGelu": 1, "Mul": 1},
        },
    ),
    "qwen2, q, v and up": (
        qwen2,
        {
            **{"MatMul": 4, "LoraAdd": 1, "GroupQueryAttention": 1, "SkipSimplifiedLayerNormalization": 2},
            "LoraSwiGLU": 1,
        },
    ),
    "qwen3": (qwen3, {**LAYER, "LoraSkipRMSNorm": 4}),  # two of them by heads, in place of norms of q and k
    "gemma 3": (gemma3, {**LAYER, "LoraSkipRMSNorm": 4, "SkipSimplifiedLayerNormalization": 2, "Add": 6}),
}
"""A layer. Gemma's additions are of weights, 1 + gamma: ONNX Runtime computes them once."""


@dataclass(frozen=True)
class Made:
    model: nn.Module
    result: ExportResult

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(str(self.result.directory / "model.onnx"), load_external_data=False).graph

    @property
    def ops(self) -> Counter[str]:
        return Counter(node.op_type for node in self.graph.node)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    known: dict[tuple[str, bool], Made] = {}

    def get(name: str, *, hot_swap: bool = False) -> Made:
        if (name, hot_swap) not in known:
            torch.manual_seed(3)
            model = CASES[name][0]()
            place = tmp_path_factory.mktemp("operators") / "out"
            known[name, hot_swap] = Made(model, export_onnx(model, place, custom_ops=True, hot_swap=hot_swap))
        return known[name, hot_swap]

    return get


@pytest.mark.parametrize("name", CASES)
def test_nodes_and_numbers(made: Callable[..., Made], name: str) -> None:
    found = made(name)
    layer = CASES[name][1]
    assert {op: count for op, count in found.ops.items() if op.startswith("Lora")} == {
        op: LAYERS * count for op, count in layer.items() if op.startswith("Lora")
    }
    outside = {"MatMul": 1, "SimplifiedLayerNormalization": 1, "Gather": 1, "Transpose": 1, "Cast": 2, "ReduceSum": 1}
    outside |= {"Sub": 1, "Shape": 1, "Squeeze": 1, "Mul": 1, "Add": 1}
    for op, count in layer.items():
        assert 0 <= found.ops[op] - LAYERS * count <= outside.get(op, 0), op
    assert sum(found.ops.values()) <= LAYERS * sum(layer.values()) + sum(outside.values())
    assert found.result.greedy_tokens_equal
    assert found.result.max_rel_error < 1e-5
    assert read_manifest(found.result.directory).custom_ops


def test_a_llama_layer_has_nine_nodes(made: Callable[..., Made]) -> None:
    nodes = list(made("llama").graph.node)
    first = next(index for index, node in enumerate(nodes) if node.op_type == "MatMul")
    layer = [node for node in nodes[first:] if node.op_type not in ("Cast", "Shape", "Squeeze")][:9]
    assert [node.op_type for node in layer] == [
        *("MatMul", "LoraAdd", "GroupQueryAttention", "MatMul", "LoraSkipRMSNorm"),
        *("MatMul", "LoraSwiGLU", "MatMul", "LoraSkipRMSNorm"),
    ]
    assert [*layer[2].input[1:3]] == ["", ""], "q, k and v are one value"


@torch.no_grad()
def test_packs_end_where_a_line_of_memory_does(made: Callable[..., Made]) -> None:
    graph = made("llama").graph
    widths = {weight.name: weight.dims[-1] for weight in graph.initializer if weight.dims}
    ours = {node.input[0] for node in graph.node if node.domain == "flora_ort"}
    packs = [widths[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.output[0] in ours]
    assert packs == [128, 64, 192, 64] * LAYERS  # 80 + 13, 48 + 5, 160 + 10 and 48 + 8 of them are read


def test_logits_are_those_of_float64(made: Callable[..., Made]) -> None:
    found = made("llama")
    decoder = load(found.result.directory)
    assert isinstance(decoder, Decoder)
    ids = torch.randint(1, 97, (2, 9))
    expected = found.model.double()(input_ids=ids).logits
    found.model.float()
    assert (decoder(ids).double() - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_another_lora(made: Callable[..., Made], tmp_path: Path) -> None:
    """z comes from a GEMM of its own: four nodes more a layer."""
    swappable = made("llama", hot_swap=True)
    layer = {**LAYER, "MatMul": 8}
    assert sum(swappable.ops[op] for op in layer) == LAYERS * sum(layer.values()) + 1  # and the head
    decoder = load(swappable.result.directory)
    assert isinstance(decoder, Decoder)
    ids = torch.randint(1, 97, (2, 9))
    before = decoder(ids)
    other: Any = llama()
    other.load_state_dict(swappable.model.state_dict())
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    other.save_pretrained(tmp_path)
    decoder.load_adapter(tmp_path)
    expected = other.double()(input_ids=ids).logits
    assert (decoder(ids).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    decoder.load_adapter(swappable.model)
    assert torch.equal(decoder(ids), before)


def test_onnxruntime_genai_finds_the_operators(made: Callable[..., Made]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    found = made("llama")
    place = found.result.directory
    options = json.loads((place / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert (place / options["custom_ops_library"]).is_file()
    assert options["custom_ops_library"] in found.result.files
    model = genai.Model(str(place))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=14, min_length=14)
    generator = genai.Generator(model, parameters)
    generator.append_tokens([11, 23, 5])
    while not generator.is_done():
        generator.generate_next_token()
    decoder = load(place)
    assert isinstance(decoder, Decoder)
    expected = decoder.generate(torch.tensor([[11, 23, 5]]), max_new_tokens=11, eos_token_id=[])
    assert generator.get_sequence(0).tolist() == expected[0].tolist()


# What is no LoRA


def graph_of(nodes: str, weights: dict[str, list[int]]) -> ir.Model:
    """A graph in ONNX's text form, with weights of some sizes."""
    stored = ", ".join(f"float{sizes} {name}" for name, sizes in weights.items())
    parsed = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
        g (float[1, 3, 4] x, {stored}) => (float[1, 3, 6] out) {{ {nodes} }}"""
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(parsed))
    for name, sizes in weights.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(torch.randn(sizes).numpy(), name=name)
        model.graph.register_initializer(value)
    return model


def fusion_of_nothing() -> Any:
    return report(fuse(torch.fx.symbolic_trace(nn.Linear(2, 3))))


def test_two_gemms_that_are_added_are_no_lora() -> None:
    """As in a layer whose attention and MLP stand side by side."""
    model = graph_of(
        "a = MatMul(x, W1)  b = MatMul(x, W2)  c = MatMul(b, W3)  out = Add(a, c)",
        {"W1": [4, 6], "W2": [4, 2], "W3": [2, 6]},
    )
    assert not use_lora_operators(model, fusion_of_nothing())
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "MatMul", "Add"]
