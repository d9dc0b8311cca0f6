"""A decoder that is written operator by operator is the graph that torch.onnx and onnxscript make of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy
import onnx_ir as ir
import pytest
import torch
from torch.export import ExportedProgram

from benchmarks.measure.memory import added_bytes
from flora_fx.export import export_onnx
from flora_fx.export.directory import saving
from flora_fx.export.directory.saving import save_graphs
from flora_fx.export.forms import DECODER_FORMS, SWAPPABLE_FORMS
from flora_fx.export.rewrite.splits import join_heads, split_once
from flora_fx.export.trace.decoder import trace_decoder
from flora_fx.export.trace.model import private_copy, unwrap
from flora_fx.export.trace.traced import Traced
from flora_fx.export.translate.direct import Unknown, write_graph
from flora_fx.export.translate.lowering import by_torch_onnx, lower
from flora_fx.fusing import fuse_unstored
from tests.export.exported_models import FAMILIES, build


def programs(name: str, dtype: torch.dtype, *, hot_swap: bool = False) -> tuple[ExportedProgram, Traced]:
    """A model as it is translated."""
    traced = trace_decoder(private_copy(unwrap(build(name)), dtype))
    program = fuse_unstored(traced.program, SWAPPABLE_FORMS if hot_swap else DECODER_FORMS)
    split_once(program)
    join_heads(program)
    return program, traced


def told(model: ir.Model) -> tuple[Counter[Hashable], list[Hashable]]:
    """Every node by all that it is computed from, and the outputs by theirs: names of values do not count."""
    known: dict[ir.Value | None, Hashable] = {None: None}
    known |= {value: ("input", value.name, str(value.type), str(value.shape)) for value in model.graph.inputs}
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        content = value.const_value.numpy()
        name = value.name if "." in str(value.name) else None
        known[value] = ("initializer", name, str(content.dtype), content.shape, content.tobytes())
    nodes: dict[Hashable, int] = {}
    count: Counter[Hashable] = Counter()
    for node in model.graph:
        attributes = tuple(sorted((name, plain(attribute.value)) for name, attribute in node.attributes.items()))
        inputs = tuple(known[value] for value in node.inputs)
        number = nodes.setdefault((node.domain, node.op_type, attributes, inputs), len(nodes))
        count[node.domain, node.op_type, attributes, inputs] += 1
        known |= {value: (number, index) for index, value in enumerate(node.outputs)}
    # Numbers are of an order that may differ: what they stand for does not.
    meaning = {number: key for key, number in nodes.items()}
    digests: dict[int, int] = {}

    def digest(key: Any) -> Hashable:
        if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], int) and isinstance(key[1], int):
            if key[0] not in digests:
                domain, op, attributes, inputs = meaning[key[0]]  # type: ignore[misc]
                digests[key[0]] = hash((domain, op, attributes, tuple(map(digest, inputs))))
            return (digests[key[0]], key[1])
        return key  # type: ignore[no-any-return]

    told_nodes = Counter({digest((number, 0)): count[key] for key, number in nodes.items()})
    outputs: list[Hashable] = [
        (value.name, str(value.type), str(value.shape), digest(known[value])) for value in model.graph.outputs
    ]
    return told_nodes, outputs


def plain(value: Any) -> Hashable:
    if isinstance(value, float):
        return float(numpy.float32(value))
    return tuple(value) if isinstance(value, list | tuple) else value  # type: ignore[no-any-return]


FAST = ("Llama", "Qwen3", "OPT")
SAME = (*FAMILIES, "Qwen2", "StarCoder2", "SmolLM3", "OLMo2", "Granite", "Cohere", "GLM", "Phi", "GPT-NeoX", "OPT")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in (*SAME, "GPT-2")]
)
def test_the_graph_is_that_of_torch_onnx(name: str) -> None:
    program, traced = programs(name, torch.float32)
    written = told(write_graph(program, traced))
    assert written == told(by_torch_onnx(program, traced))


@pytest.mark.parametrize("name", ["Qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Phi-3", "OPT"))])
def test_so_it_is_in_half_precision(name: str) -> None:
    program, traced = programs(name, torch.float16)
    written = told(write_graph(program, traced))
    assert written == told(by_torch_onnx(program, traced))


@pytest.mark.slow
def test_so_it_is_where_the_adapter_may_be_replaced() -> None:
    program, traced = programs("Llama", torch.float32, hot_swap=True)
    written = told(write_graph(program, traced))
    assert written == told(by_torch_onnx(program, traced))


def test_comparing_graphs_tells_them_apart() -> None:
    program, traced = programs("Llama", torch.float32)
    graph = write_graph(program, traced)
    before = told(graph)
    attention = next(node for node in graph.graph if node.op_type == "GroupQueryAttention")
    attention.attributes["scale"] = ir.AttrFloat32("scale", 0.3)
    assert told(graph) != before


def test_what_is_not_known_goes_through_torch_onnx(caplog: pytest.LogCaptureFixture) -> None:
    program, traced = programs("GLM, 8", torch.float32)  # rotary positions outside of the attention
    with pytest.raises(Unknown, match="rotary_rows"):
        write_graph(program, traced)
    with caplog.at_level(logging.INFO, logger="flora_fx"):
        graph = lower(program, traced)
    assert "the program has flora_fx.rotary_rows" in caplog.text
    assert [value.name for value in graph.graph.outputs] == list(traced.outputs)


@pytest.mark.parametrize(
    "name", ["Cohere", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Gemma-2", "Gemma-3", "OLMo2"))]
)
def test_norms_and_rotary_positions_in_float32_of_a_model_in_half(name: str, tmp_path: Path) -> None:
    """Gemma's norms multiply by float32, Cohere's and OLMo 2's round behind; both rotate in float32."""
    result = export_onnx(build(name), tmp_path / "out", dtype=torch.float16, target="decoder")
    assert result.max_rel_error < 2e-2  # tokens are those of PyTorch but at near ties, or there were no result
    assert not [note for note in result.notes if "rotary" in note]


def test_weights_are_made_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each of those that write, of which one is this thread if there is but one."""
    monkeypatch.setattr(saving, "_WRITERS", 1)
    program, traced = programs("Llama", torch.float32)
    graph = write_graph(program, traced)
    sizes = [value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None]
    peak = added_bytes(lambda: save_graphs({"model.onnx": graph}, tmp_path), "cpu")
    assert max(sizes) <= peak < 2.5 * max(sizes) < sum(sizes) / 2, "a pack, a part of it scaled, and the transposed one"


def test_two_that_write_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, traced = programs("Llama", torch.float32)
    written = []
    for writers in (1, saving._WRITERS):
        monkeypatch.setattr(saving, "_WRITERS", writers)
        place = tmp_path / str(writers)
        place.mkdir()
        save_graphs({"model.onnx": write_graph(program, traced)}, place)
        written.append([(place / name).read_bytes() for name in ("model.onnx", "model.onnx.data")])
        assert len(list(place.iterdir())) == 2
    assert written[0] == written[1]
