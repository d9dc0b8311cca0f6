"""A quantized base with its adapter unmerged on ONNX Runtime: the graph, the numbers, the tokens, another adapter."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime_genai
import peft
import pytest
import torch

import flora_fx.export.check.quantized as checking
from flora_fx.errors import ExportError
from flora_fx.export import export_onnx, load
from flora_fx.export.check.quantized_bits import stored_weights
from flora_fx.export.directory.manifest import read_manifest
from flora_fx.export.trace.model import private_copy, unwrap
from flora_fx.export.trace.quantized_base import QuantizedBase
from tests.export.exported_models import Exported

from .models import FORMATS, LAYERS, build, greedy

PROMPT = torch.tensor([[11, 23, 5, 40, 8]])
Get = Callable[..., Exported]


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Exports by format and options, each made when it is first asked for; the LoRA in it may be replaced."""
    known: dict[Any, Exported] = {}
    root = tmp_path_factory.mktemp("quantized")

    def get(name: str, **options: Any) -> Exported:
        key = (name, *sorted(options.items()))
        if key not in known:
            model = build(name)
            place = root / str(len(known))
            result = export_onnx(model, place, **{"hot_swap": True, **options})
            known[key] = Exported(model, result, load(place))
        return known[key]

    return get


def ops(directory: Path) -> Counter[str]:
    graph = onnx.load(str(directory / "model.onnx"), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_as_it_is_exported_where_nothing_is_asked_for(quantized: Get, name: str) -> None:
    made = quantized(name)
    base = made.decoder.manifest.base
    codebook = name.startswith(("NF4", "FP4"))
    assert set(base["forms"].values()) == {"dequantize" if codebook else "keep"}
    assert base["bit_equal"] == 7 * LAYERS
    assert base["operators"] == {"MatMul" if codebook else "MatMulNBits": 4 * LAYERS}
    assert len(base["probes"]) == (0 if codebook else 2 if name == "8 bits, a row" else 1), "K of 64 and of 96"
    assert all(found["exact"] for found in base["probes"])
    assert made.result.max_rel_error < 1e-5
    assert made.result.greedy_tokens_equal
    assert len(made.result.report.fused) == 7 * LAYERS
    assert torch.equal(made.decoder.generate(PROMPT, max_new_tokens=64), greedy(made.model, PROMPT, 64))


@pytest.mark.parametrize(
    ("name", "dtype", "options", "least"),
    [
        ("4 bits", torch.float16, {}, 1e-5),
        ("4 bits", torch.float32, {"activations": "int8"}, 1e-2),
        ("NF4", torch.bfloat16, {}, 1e-4),
    ],
    ids=["half precision", "int8", "dequantized"],
)
def test_checked_by_parts(name: str, dtype: torch.dtype, options: dict[str, Any], least: float, tmp_path: Path) -> None:
    """As a large one is: keys and values that nobody reads take no other's place; errors are those of what is asked."""
    made = export_onnx(build(name, layers=2), tmp_path / "out", dtype=dtype, verify="quick", **options)
    assert made.verified == "quick"
    assert least < made.max_rel_error
    assert read_manifest(made.directory).base["bit_equal"] == 14


def test_bitsandbytes_own_operator(quantized: Get) -> None:
    made = quantized("NF4", base="keep")
    assert made.decoder.manifest.base["operators"] == {"MatMulBnb4": 4 * LAYERS}
    assert ops(made.directory)["MatMulBnb4"] == 4 * LAYERS
    assert [found["across"] for found in made.decoder.manifest.base["probes"]] == [False]
    assert torch.equal(made.decoder.generate(PROMPT, max_new_tokens=64), greedy(made.model, PROMPT, 64))


@pytest.mark.parametrize("base", ["keep", "dequantize"])
def test_codebooks_whose_blocks_go_across_rows(quantized: Get, base: str) -> None:
    """Inputs of 64 and of 96 in blocks of 128: half a row each, or a row and a third."""
    made = quantized("NF4 across rows", base=base)
    told = made.decoder.manifest.base
    assert told["bit_equal"] == 7 * LAYERS
    assert [(found["across"], found["exact"]) for found in told["probes"]] == ([(True, True)] if base == "keep" else [])
    assert made.result.max_rel_error < 1e-5
    assert torch.equal(made.decoder.generate(PROMPT, max_new_tokens=64), greedy(made.model, PROMPT, 64))


@pytest.mark.parametrize(("name", "options"), [("4 bits, act-order", {}), ("NF4", {}), ("NF4", {"base": "keep"})])
def test_another_adapter_takes_the_place(quantized: Get, name: str, options: dict[str, Any]) -> None:
    made, other = quantized(name, **options), build(name, seed=8)
    made.decoder.load_adapter(other)
    wanted = greedy(other, PROMPT, 64)
    assert not torch.equal(wanted, greedy(made.model, PROMPT, 64))
    assert torch.equal(made.decoder.generate(PROMPT, max_new_tokens=64), wanted)
    made.decoder.load_adapter(made.model)
    assert torch.equal(made.decoder.generate(PROMPT, max_new_tokens=64), greedy(made.model, PROMPT, 64))


@pytest.mark.parametrize(("name", "options"), [("4 bits, zero points", {}), ("NF4", {"base": "keep"})])
def test_onnxruntime_genai(quantized: Get, name: str, options: dict[str, Any]) -> None:
    made = quantized(name, **options)
    expected = greedy(made.model, PROMPT, 24)[0].tolist()
    model = onnxruntime_genai.Model(str(made.directory))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(expected), do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(PROMPT[0].numpy().astype("int32"))
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0).tolist()
    assert found == expected[: len(found)]
    assert len(found) > PROMPT.shape[1] + 8 or 0 in found


def test_several_adapters_beside_one_base(tmp_path: Path) -> None:
    model = build("4 bits, zero points")
    two = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model.add_adapter("two", two)
    result = export_onnx(model.eval(), tmp_path / "out", adapters=["default", "two"])
    decoder = load(tmp_path / "out")
    assert decoder.manifest.base["bit_equal"] == 7 * LAYERS
    assert result.max_rel_error < 1e-5
    names = ["two", None, "default"]
    found = decoder.generate(PROMPT.repeat(3, 1), adapters=names, max_new_tokens=32)
    for row, name in enumerate(names):
        model.set_adapter(name or "two")
        with nullcontext() if name else model.disable_adapter():
            assert torch.equal(found[row : row + 1], greedy(model, PROMPT, 32)), name
    assert len({tuple(row.tolist()) for row in found}) == 3


def test_every_number_is_the_sources(quantized: Get) -> None:
    made = quantized("4 bits, zero points")
    layer = unwrap(made.model).model.layers[0].self_attn  # type: ignore[union-attr, index]
    [packed] = [w for w in stored_weights(made.directory / "model.onnx") if len(w.values) == 64 + 32 + 32]
    parts = [getattr(layer, f"{which}_proj").base_layer.quantized.dequantize(torch.float32) for which in "qkv"]
    assert torch.equal(torch.from_numpy(packed.values), torch.cat(parts))


def test_a_file_that_says_something_else_is_refused(quantized: Get, tmp_path: Path) -> None:
    made = quantized("4 bits, zero points")
    sources = {
        name: part.quantized
        for name, part in private_copy(unwrap(made.model)).named_modules()
        if name.endswith("base_layer")
    }
    base = QuantizedBase(sources, {"affine": "keep"}, "exact")
    graphs = [made.directory / "model.onnx"]
    found = checking.check_base(graphs, base, made.result.report, None)
    assert found["bit_equal"] == 7 * LAYERS
    name = "model.layers.0.mlp.up_proj.base_layer"
    codes = sources[name].codes.clone()
    codes[3, 5] ^= 1
    wrong = replace(base, layers={**sources, name: replace(sources[name], codes=codes)})
    with pytest.raises(
        ExportError, match=rf"the weight of {name} was written by MatMulNBits .* 1 of 6144 numbers differ"
    ):
        checking.check_base(graphs, wrong, made.result.report, None)
    more = replace(base, layers={**sources, "more": sources[name]})
    with pytest.raises(ExportError, match="the export lacks the weight of more"):
        checking.check_base(graphs, more, made.result.report, None)
    fewer = replace(base, layers={other: weight for other, weight in sources.items() if other != name})
    with pytest.raises(ExportError, match="which are no layer's"):
        checking.check_base(graphs, fewer, made.result.report, None)


def test_products_in_int8_are_measured(quantized: Get) -> None:
    exact, rounded = quantized("4 bits, zero points"), quantized("4 bits, zero points", activations="int8")
    assert rounded.result.max_rel_error > 100 * exact.result.max_rel_error
    assert any("int8" in note for note in rounded.result.notes)
    graph = onnx.load(str(rounded.directory / "model.onnx"), load_external_data=False).graph
    levels = {a.i for node in graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {4}


def test_half_precision(tmp_path: Path) -> None:
    """NF4's scales are float32: the weight is computed in that, and rounded once."""
    result = export_onnx(build("NF4"), tmp_path / "out", dtype=torch.float16)
    assert result.max_rel_error < 1e-2
    assert load(tmp_path / "out").manifest.base["bit_equal"] == 7 * LAYERS


def test_eager_attention(tmp_path: Path) -> None:
    """In float64 transformers' own makes NaN of padding."""
    model = build("4 bits", layers=2)  # the second one reads what the first made of padding
    unwrap(model).set_attn_implementation("eager")
    result = export_onnx(model, tmp_path / "out")
    assert result.max_rel_error < 1e-5
    assert torch.equal(load(tmp_path / "out").generate(PROMPT, max_new_tokens=16), greedy(model, PROMPT, 16))


def test_the_users_model_stays_as_it_was(tmp_path: Path) -> None:
    model = build("8 bits, a row").train()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, tmp_path / "out")
    assert model.training
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.base_model.model.model.layers[0].mlp.up_proj.base_layer.block == 64, "not what was cut for the export"


def test_plain_weights_are_fused_as_any(tmp_path: Path) -> None:
    result = export_onnx(build("4 bits"), tmp_path / "out", base="float")
    assert "MatMulNBits" not in ops(tmp_path / "out")
    assert load(tmp_path / "out").manifest.base == {}
    assert result.max_rel_error < 1e-4


def test_plain_operators_fold_the_weights(tmp_path: Path) -> None:
    model = build("4 bits, act-order")
    result = export_onnx(model, tmp_path / "out", target="general")
    found = load(tmp_path / "out")
    assert found.manifest.base["forms"] == {"affine": "dequantize"}
    assert result.files["model.onnx.data"] < 97 * 64 * 4 + 40000, "few bits in the file"
    assert torch.equal(found.generate(PROMPT, max_new_tokens=16), greedy(model, PROMPT, 16))


def test_what_cannot_be_kept_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flora_fx.export.exporting.choose_operators", lambda asked, *_: bool(asked))
    for options, message in (
        ({"base": "keep", "target": "general"}, "base='keep' is for target 'decoder'"),
        ({"custom_ops": True}, "custom_ops is for plain weights"),
    ):
        with pytest.raises(ExportError, match=message):
            export_onnx(build("4 bits"), tmp_path / "out", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
    for options, message in (({"base": "kept"}, "base is 'kept'"), ({"activations": "int4"}, "activations is 'int4'")):
        with pytest.raises(ValueError, match=message):
            export_onnx(build("4 bits"), tmp_path / "out", **options)  # type: ignore[arg-type]


def test_a_layer_of_each_kind_is_traced_and_the_graph_has_few_nodes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as with a float base whose adapter may be replaced: 100 are allowed."""
    with caplog.at_level("INFO", "flora_fx.export"):
        export_onnx(build("4 bits, zero points", 4), tmp_path / "out")
    assert "takes longer" not in caplog.text
    found = ops(tmp_path / "out")
    assert sum(found.values()) == 98
    assert (found["MatMulNBits"], found["MatMul"], found["Add"]) == (16, 2 * 16 + 1, 16)
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    held = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.UINT8]
    linears = 4 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96)
    zero_points = 4 * (128 + 64 + 192 + 2 * 64)  # a byte a row of two blocks, two of three
    assert sum(math.prod(tensor.dims) for tensor in held) == linears // 2 + zero_points
    content = json.loads((tmp_path / "out" / "flora_fx.json").read_text(encoding="utf-8"))
    assert content["base"]["bit_equal"] == 28
