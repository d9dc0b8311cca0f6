"""What an export whose rows choose among LoRAs is made of: graphs, dtypes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import peft
import pytest
import torch
import transformers
from onnx import TensorProto

from flora_fx.adapters import FloraConfig
from flora_fx.config import FuseConfig
from flora_fx.errors import AdapterError, ExportError
from flora_fx.export import export_onnx, load_decoder
from flora_fx.export.forms import DECODER_FORMS, stacked_forms
from flora_fx.export.lora.stacking import SlotPlan
from flora_fx.export.lora.swappable import SwappablePart, SwappableWeight
from flora_fx.export.translate import slots
from tests.export.exported_models import plain
from tests.export.slot_models import Mixed
from tests.faults.models import ADAPTERS, adapted, base


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options})


def graph_of(directory: Path) -> onnx.GraphProto:
    return onnx.load(str(directory / "model.onnx"), load_external_data=False).graph


# Graphs


@pytest.mark.parametrize("export", ["fixed", "slots"])
def test_each_low_rank_value_is_selected_once(mixed: Mixed, export: str) -> None:
    graph = graph_of(getattr(mixed, export))
    made = {name: node for node in graph.node for name in node.output}
    selections = [node for node in graph.node if node.op_type == "Where"]
    assert len(selections) == 2 * 4, "qkv, o, gate and up, down"
    masks = {node.input[0] for node in selections}
    assert {made[mask].op_type for mask in masks} == {"Equal"}
    assert len({made[mask].input[0] for mask in masks}) == 1, "the ids are read once"
    for node in selections:
        product = made[node.input[1]]
        assert product.op_type == "MatMul"
        readers = [other.op_type for other in graph.node if product.output[0] in other.input]
        assert readers == ["Where"]
    overridable = {value.name for value in graph.input} & {value.name for value in graph.initializer}
    assert bool(overridable) is (export == "slots")


def test_slots_are_as_wide_as_their_adapters_where_they_are_fixed(mixed: Mixed) -> None:
    everywhere = sum(options["r"] for name, options in ADAPTERS.items() if name != "fewer")
    further = ADAPTERS["fewer"]["r"]  # which adapts q and down alone
    assert widths(mixed.fixed) == {
        (64, 3 * everywhere + further),
        (64, everywhere),
        (64, 2 * everywhere),
        (80, everywhere + further),
    }
    assert widths(mixed.slots) == {(64, 3 * 5 * 6), (64, 5 * 6), (64, 2 * 5 * 6), (80, 5 * 6)}


def widths(directory: Path) -> set[tuple[int, ...]]:
    """Of the packs of A's."""
    graph = graph_of(directory)
    sizes = {value.name: tuple(value.dims) for value in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    return {sizes[made[node.input[1]].input[1]] for node in graph.node if node.op_type == "Where"}


@pytest.mark.parametrize("export", ["fixed", "slots"])
def test_a_b_for_each_projection_on_a_cpu(mixed: Mixed, export: str) -> None:
    """None is block-diagonal: its zeros grow with the adapters. On a GPU they cost less than launches."""
    graph = graph_of(getattr(mixed, export))
    sizes = {value.name: tuple(value.dims) for value in graph.initializer}
    selected = {node.output[0] for node in graph.node if node.op_type == "Where"}
    pieces = {
        name for node in graph.node if node.op_type == "Split" and node.input[0] in selected for name in node.output
    }
    found = [
        sizes[node.input[1]][1]
        for node in graph.node
        if set(node.input) & (selected | pieces) and node.op_type == "MatMul"
    ]
    assert sorted(found) == sorted(2 * [64, 32, 32, 64, 80, 80, 64])
    assert stacked_forms(DECODER_FORMS, "CUDAExecutionProvider") == DECODER_FORMS


def test_bfloat16(tmp_path: Path) -> None:
    """ONNX Runtime selects no bfloat16 on CUDA: there it is selected in float32."""
    export_onnx(adapted("same", "lower"), tmp_path / "out", adapters=["same", "lower"], dtype=torch.bfloat16)
    graph = graph_of(tmp_path / "out")
    made = {name: node for node in graph.node for name in node.output}
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    selections = [node for node in graph.node if node.op_type == "Where"]
    assert len(selections) == 4
    for node in selections:
        assert made[node.input[1]].op_type == "Cast"
        assert kinds[node.output[0]] == TensorProto.FLOAT
        (reader,) = [other for other in graph.node if node.output[0] in other.input]
        assert reader.op_type == "Cast"
        assert kinds[reader.output[0]] == TensorProto.BFLOAT16


def test_learned_positions_and_transposed_weights(tmp_path: Path) -> None:
    """GPT-2: the export's own check holds row by row."""
    model: Any = peft.get_peft_model(plain("GPT-2"), lora(fan_in_fan_out=True, init_lora_weights=False), "one")
    model.add_adapter("two", lora(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    active, training = model.active_adapters, model.training
    export_onnx(model, tmp_path / "out", adapters=["one", "two"], slots=3)
    assert [slot.rank for slot in load_decoder(tmp_path / "out").slots] == [3, 4, 0]
    assert (model.active_adapters, model.training) == (active, training)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_s_below_their_bases(tmp_path: Path) -> None:
    """What is selected is a part of a product; the export's own check holds row by row."""
    joined = FuseConfig(**{**vars(DECODER_FORMS), "layout": "joined"})
    export_onnx(adapted("same", "fewer"), tmp_path / "out", adapters=["same", "fewer"], config=joined)
    graph = graph_of(tmp_path / "out")
    made = {name: node for node in graph.node for name in node.output}
    selections = [node for node in graph.node if node.op_type == "Where"]
    assert [made[node.input[1]].op_type for node in selections] == ["Split"] * 4


# Refused


def half() -> Any:
    """As PEFT has it of a half-precision base: the adapters are in float32."""
    model: Any = peft.get_peft_model(base().half(), lora(), adapter_name="sql")
    model.add_adapter("chat", lora())
    return model


def two(second: Any) -> Any:
    model: Any = peft.get_peft_model(base(), lora(), adapter_name="sql")
    model.add_adapter("chat", second)
    return model


def merged() -> Any:
    model = two(lora())
    model.merge_adapter(["sql"])
    return model


def diverged() -> Any:
    model = two(lora())
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.lora_A["chat"].weight[1, 2] = float("nan")
    return model


def enormous() -> Any:
    model = two(lora())
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.lora_B["chat"].weight.fill_(3e38)
    return model


BOTH = {"adapters": ["sql", "chat"]}
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no adapter": (base, BOTH, ExportError, "are for a PEFT model, whose LoRAs say which layers have"),
    "unknown": (lambda: two(lora()), {"adapters": ["sql", "sqk"]}, AdapterError, "no adapter 'sqk'; it has 'sql', 'ch"),
    "one twice": (lambda: two(lora()), {"adapters": ["sql", "sql"]}, ValueError, "at least one adapter, and each once"),
    "none": (lambda: two(lora()), {"adapters": []}, ValueError, "at least one adapter"),
    "a name alone": (lambda: two(lora()), {"adapters": "sql"}, TypeError, "must be a list of names"),
    "PEFT's word for none": (
        lambda: peft.get_peft_model(base(), lora(), adapter_name="__base__"),
        {"adapters": ["__base__"]},
        AdapterError,
        "cannot be called '__base__'",
    ),
    "too few slots": (lambda: two(lora()), {**BOTH, "slots": 1}, AdapterError, "there are 2 adapters; pass slots=2 or"),
    "no slots": (lambda: two(lora()), {"slots": 0}, ValueError, "slots is 0; it must be a whole number of at least 1"),
    "half a rank": (lambda: two(lora()), {"rank": 1.5}, ValueError, "rank is 1.5; it must be a whole number"),
    "too low a rank": (
        lambda: two(lora(r=6)),
        {**BOTH, "rank": 5},
        AdapterError,
        "rank is 5, and the adapter 'chat' has rank 6; pass rank=6 or more",
    ),
    "FFBA": (
        lambda: peft.get_peft_model(base(), FloraConfig(r=4), adapter_name="sql"),
        {"adapters": ["sql"]},
        AdapterError,
        "the adapter 'sql' is of PEFT's type FLORA",
    ),
    "DoRA": (lambda: two(lora(use_dora=True)), BOTH, AdapterError, "the adapter 'chat' has use_dora=True"),
    "biases of B": (lambda: two(lora(lora_bias=True)), BOTH, AdapterError, "the adapter 'chat' has lora_bias=True"),
    "whole modules": (
        lambda: two(lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
        {"adapters": ["sql"]},
        AdapterError,
        r"the adapter 'chat' has modules_to_save=\['lm_head'\]",
    ),
    "an embedding": (
        lambda: two(lora(target_modules=["embed_tokens", "q_proj"])),
        BOTH,
        AdapterError,
        "the adapter 'chat' adapts the embedding model.embed_tokens; only linear layers have slots",
    ),
    "merged": (merged, BOTH, AdapterError, r"has an adapter merged into it; call model.unmerge_adapter\(\) first"),
    "NaN": (diverged, BOTH, AdapterError, "'chat': A of model.layers.0.mlp.down_proj holds NaN or Inf; its training"),
    "too large": (enormous, BOTH, AdapterError, "times its scale 1.66667, is too large for torch.float32; export the"),
    "another dtype": (
        half,
        BOTH,
        ExportError,
        "fused completely; declined: .* is float32 and linear is float16; convert",
    ),
    "another target": (
        lambda: two(lora()),
        {**BOTH, "target": "general"},
        ExportError,
        "adapters= is for target 'decoder'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    make, options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        export_onnx(make(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "reader", ["y = Relu(p)", "y, rest = Split <axis = -1> (p, sizes)"], ids=["all of it", "a part that holds more"]
)
def test_a_low_rank_value_that_does_not_stand_alone(reader: str) -> None:
    """No fused form reads it so; if one ever did, rows would have what other adapters add."""
    parsed = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[1, 3, 4] x, float[4, 5] A, int64[2] sizes) => (float[1, 3, 5] y) {{ p = MatMul(x, A)  {reader} }}"""
    )
    model = ir.from_proto(parsed)
    for name, value in (("A", np.zeros((4, 5), np.float32)), ("sizes", np.array([3, 2]))):
        given = next(found for found in model.graph.inputs if found.name == name)
        model.graph.inputs.remove(given)
        given.const_value = ir.tensor(value, name=name)
        model.graph.register_initializer(given)
    for node in model.graph:
        for output, width in zip(node.outputs, [3, 2] if node.op_type == "Split" else [5], strict=True):
            output.shape, output.dtype = ir.Shape([1, 3, width]), ir.DataType.FLOAT
    weight = SwappableWeight("A", transposed=True, parts=(SwappablePart("layer", "A", (2, 5), (0, 4)),))
    plan = SlotPlan((), (), {"layer": (2, 1)}, replaceable=False)
    with pytest.raises(ExportError, match="needs low-rank values that stand alone; y holds others, too: leave config"):
        slots._Selection(model, plan, ir.Value(name="ids")).write([weight])


def test_the_check_sees_rows_that_get_another_ones_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners = slots._Selection._owners
    monkeypatch.setattr(slots._Selection, "_owners", lambda self, weight: owners(self, weight)[::-1])
    with pytest.raises(ExportError, match="PyTorch: the logits of a prompt with the adapter 'same' differs"):
        export_onnx(adapted("same", "exported"), tmp_path / "out", adapters=["same", "exported"])
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_decoder(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=80
    )
    model = peft.get_peft_model(transformers.BertModel(config), lora(), adapter_name="sql")
    with pytest.raises(ExportError, match="adapters= is for target 'decoder'; encoder"):
        export_onnx(model, tmp_path / "out", adapters=["sql"])
