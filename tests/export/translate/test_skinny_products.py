"""A decoder as it is written for CUDA: its products in SkinnyMatMul. The same graph runs on the CPU here."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import peft
import pytest
import torch
import transformers
from torch import nn

from flora_fx.export import Decoder, export_onnx, load
from flora_fx.export.translate import products
from flora_fx.export.translate.products import arrange_products

LAYERS = 2
SIZES: dict[str, Any] = {
    **{"vocab_size": 97, "num_hidden_layers": LAYERS, "max_position_embeddings": 64, "hidden_size": 64},
    **{"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
}
pytestmark = pytest.mark.usefixtures("library")

Written = Callable[..., tuple[nn.Module, Path, onnx.GraphProto]]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Exports a model for the CPU with products as CUDA has them."""
    monkeypatch.setattr(
        "flora_fx.export.exporting.arrange_products", lambda model, _: arrange_products(model, "CUDAExecutionProvider")
    )

    def write(dtype: torch.dtype = torch.float16, *, tied: bool = True, **options: Any) -> Any:
        torch.manual_seed(5)
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
        ranks = {"r": 5, "lora_alpha": 7, "rank_pattern": {"v_proj": 3, "down_proj": 8}}
        model = peft.get_peft_model(
            transformers.LlamaForCausalLM(config).eval(),  # type: ignore[arg-type]
            peft.LoraConfig(**ranks, target_modules="all-linear", init_lora_weights=False),
        ).to(dtype)
        place = tmp_path / f"{dtype}-{tied}"
        result = export_onnx(model, place, custom_ops=True, **options)
        assert result.greedy_tokens_equal
        return model, place, onnx.load(str(place / "model.onnx"), load_external_data=False).graph

    return write


@pytest.mark.parametrize("tied", [True, False])
def test_a_layer_has_nine_nodes_and_weights_as_the_model_has_them(written: Written, tied: bool) -> None:
    _model, _place, graph = written(tied=tied)
    ops = Counter(node.op_type for node in graph.node)
    assert ops["SkinnyMatMul"] == 4 * LAYERS + 1, "and the head"
    assert not ops["MatMul"]
    assert not ops["Transpose"]
    weights = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    heads = [name for name, sizes in weights.items() if sizes == (97, 64)]
    assert len(heads) == (1 if tied else 2), "a tied embedding is there once"
    assert sorted(sizes for name, sizes in weights.items() if "layers_0" in name and not name.endswith(".T")) == [
        *((80, 64), (80, 96), (144, 64), (208, 64))  # 64 + 5, 64 + 8, 128 + 13 and 192 + 10 rows, to whole tiles
    ]
    first = next(index for index, node in enumerate(graph.node) if node.op_type == "SkinnyMatMul")
    layer = [node.op_type for node in graph.node[first:] if node.op_type not in ("Cast", "Shape", "Squeeze")][:9]
    assert layer == [
        *("SkinnyMatMul", "LoraAdd", "GroupQueryAttention", "SkinnyMatMul", "LoraSkipRMSNorm"),
        *("SkinnyMatMul", "LoraSwiGLU", "SkinnyMatMul", "LoraSkipRMSNorm"),
    ]


@torch.no_grad()
def test_logits_are_as_near_to_float64_as_plain_products(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    model, place, _graph = written()
    monkeypatch.setattr(products, "use_skinny_products", lambda model: 0)
    plain = place.with_name("plain")
    export_onnx(model, plain, custom_ops=True)
    ids = torch.randint(1, 97, (2, 9))
    found = [load(directory) for directory in (place, plain)]
    assert all(isinstance(decoder, Decoder) for decoder in found)
    expected = model.double()(input_ids=ids).logits
    ours, theirs = ((decoder(ids).double() - expected).abs().max() for decoder in found)  # type: ignore[operator]
    assert ours < 5e-3 * expected.abs().max()
    assert ours < 2 * theirs


@torch.no_grad()
def test_a_lora_that_may_be_replaced(written: Written, tmp_path: Path) -> None:
    """A is an input [rank, in], and z a second output of the product that reads the same x: nine nodes a layer."""
    model, place, graph = written(hot_swap=True)
    ops = Counter(node.op_type for node in graph.node)
    assert (ops["SkinnyMatMul"], ops["MatMul"]) == (4 * LAYERS + 1, 0)
    assert sum(len(node.output) == 2 for node in graph.node if node.op_type == "SkinnyMatMul") == 4 * LAYERS
    decoder = load(place)
    assert isinstance(decoder, Decoder)
    ids = torch.randint(1, 97, (2, 9))
    other: Any = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    other.save_pretrained(tmp_path / "other")
    before = decoder(ids)
    decoder.load_adapter(tmp_path / "other")
    expected = other.double()(input_ids=ids).logits
    assert (decoder(ids).double() - expected).abs().max() < 1e-2 * expected.abs().max()
    assert (before.double() - expected).abs().max() > 0.1 * expected.abs().max()


def test_float32_has_none(written: Written) -> None:
    _model, _place, graph = written(torch.float32)
    assert not any(node.op_type == "SkinnyMatMul" for node in graph.node)


@torch.no_grad()
def test_rows_that_choose(written: Written) -> None:
    """Slots that may be replaced: A of all slots is one input of a layer's product."""
    model, place, graph = written(slots=2, rank=8)
    ops = Counter(node.op_type for node in graph.node)
    assert (ops["SkinnyMatMul"], ops["MatMul"], ops["Where"]) == (4 * LAYERS + 1, 0, 0)
    decoder = load(place)
    assert isinstance(decoder, Decoder)
    ids = torch.randint(1, 97, (2, 9))
    adapted, base = decoder(ids, adapters=["default", None]).double(), model.double()
    expected = base(input_ids=ids).logits[0], base.disable_adapter
    assert (adapted[0] - expected[0]).abs().max() < 1e-2 * expected[0].abs().max()
    with expected[1]():
        plain = base(input_ids=ids).logits[1]
    assert (adapted[1] - plain).abs().max() < 1e-2 * plain.abs().max()
    assert (adapted[1] - base(input_ids=ids).logits[1]).abs().max() > 0.1 * plain.abs().max()
