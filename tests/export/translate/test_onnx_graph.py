"""What is in the ONNX file of the general route: fewer GEMMs, every weight once, names that can be read."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import onnx
import pytest

import flora_fx
from flora_fx.export import export_onnx
from flora_fx.export.targets import trace
from flora_fx.export.trace.model import unwrap
from flora_fx.export.translate.lowering import lower
from tests.export.exported_models import Export, Exported, build

LAYERS = 2
ATTENTION = 2  # q·kᵀ and weights·v


def general(exported: Export, name: str) -> Exported:
    return exported(name, None if name == "bert" else "general")


def graph_of(export: Exported) -> onnx.GraphProto:
    return onnx.load(str(export.directory / "model.onnx"), load_external_data=False).graph


def gemms(ops: Counter[str]) -> int:
    return ops["MatMul"] + ops["Gemm"]


def test_projections_per_llama_layer(llama: Exported) -> None:
    ops = Counter(node.op_type for node in graph_of(llama).node)
    # qkv + its A's + 3 B's; o + A + B; gate_up + its A's + 2 B's; down + A + B; and one head
    assert gemms(ops) == LAYERS * (5 + 3 + 4 + 3 + ATTENTION) + 1
    _, traced = trace(unwrap(build("llama")), "causal-lm", target="general")
    unfused = Counter(node.op_type for node in lower(traced.program, traced).graph)
    assert gemms(unfused) == LAYERS * (7 * 3 + ATTENTION) + 1
    assert ops["Mul"] == unfused["Mul"] - LAYERS * 7, "the scales are in B"
    assert sum(ops.values()) < sum(unfused.values())


def test_report_is_of_this_export(llama: Exported) -> None:
    assert len(llama.result.report.fused) == LAYERS * 7
    assert not llama.result.report.declines
    assert "14 adapters fused" in str(llama.result)
    assert "model.onnx.data" in str(llama.result)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert"])
def test_no_weight_is_there_twice(exported: Export, name: str) -> None:
    export = general(exported, name)
    model = unwrap(export.model)
    unique = sum(p.numel() * p.element_size() for p in model.parameters())  # tied ones count once
    size = export.result.files["model.onnx.data"]
    assert 0.95 * unique < size < unique * 1.02 + 4096, "buffers and small constants are the only additions"


def test_names_are_those_of_the_model(llama: Exported) -> None:
    graph = graph_of(llama)
    names = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    assert names, "weights are initializers"
    assert all(re.match(r"model\.|lm_head\.|_flora\.layers_\d", name) for name in names), names
    assert "_flora.layers_0_self_attn_qkv.T" in names
    assert "model.layers.1.mlp.down_proj.base_layer.weight.T" in names


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert"])
def test_no_weight_is_moved_at_run_time(exported: Export, name: str) -> None:
    graph = graph_of(general(exported, name))
    matrices = {t.name for t in graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT}
    moved = [
        (node.op_type, i)
        for node in graph.node
        for i in node.input
        if i in matrices and node.op_type in ("Transpose", "Concat", "Slice", "Split", "Mul", "Cast")
    ]
    tied = [i for op, i in moved if op == "Transpose" and ("lm_head" in i or "emb" in i or "wte" in i)]
    assert len(moved) == len(tied) <= 1, f"only a tied head, which ONNX Runtime folds as it loads: {moved}"


def test_inputs_and_outputs_are_onnxruntime_genais(llama: Exported) -> None:
    graph = graph_of(llama)

    def shapes(values: object) -> dict[str, list[object]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}  # type: ignore[attr-defined]

    kv = {f"{layer}.{which}": layer for layer in range(LAYERS) for which in ("key", "value")}
    assert shapes(graph.input) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        **{f"past_key_values.{name}": ["batch", 2, "past", 12] for name in kv},
    }
    assert shapes(graph.output) == {
        "logits": ["batch", "sequence", 97],
        **{f"present.{name}": ["batch", 2, "total", 12] for name in kv},
    }


def test_nothing_of_this_machine_is_in_the_file(llama: Exported) -> None:
    content = (llama.directory / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b'File "' not in content


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["joined", "beside"])
@pytest.mark.parametrize("up", ["block_diagonal", "per_projection"])
def test_every_form_agrees_with_pytorch(tmp_path: Path, layout: str, up: str) -> None:
    config = flora_fx.FuseConfig(layout=layout, up=up, accumulate="add", fold_scale=True)  # type: ignore[arg-type]
    result = export_onnx(build("llama"), tmp_path / "out", config=config, target="general")
    assert result.greedy_tokens_equal
    ops = Counter(
        node.op_type for node in onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph.node
    )
    # qkv, o, gate_up and down, with or beside their A's; 7 B's
    per_layer = (4 if layout == "joined" else 8) + 7
    per_layer -= 3 if up == "block_diagonal" else 0  # one B for q, k, v and one for gate, up
    assert gemms(ops) == LAYERS * (per_layer + ATTENTION) + 1
