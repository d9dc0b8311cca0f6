"""Layers of other libraries, as they stand in a model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flora_fx
from flora_fx.quantized import QuantizedLinear
from flora_fx.quantized.formats.live import with_quantized_linears

from .encoders import compressed


class Two(nn.Module):
    """Two projections of one value."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(128, 64, bias=False, dtype=dtype), nn.Linear(128, 96, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(self.q(x)), self.k(x)], -1)


def bitsandbytes(dtype: torch.dtype = torch.float32, **settings: Any) -> Two:
    bnb = pytest.importorskip("bitsandbytes")
    model = Two(dtype)
    for name, layer in list(model.named_children()):
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **settings)
        options = {key: value for key, value in settings.items() if key != "compute_dtype"}
        new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=new, **options)
        new.bias = layer.bias
        setattr(model, name, new.to("cpu"))
    return model.eval()


def torchao(config: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Two:
    quantization = pytest.importorskip("torchao.quantization")
    model = Two(dtype)
    quantization.quantize_(model, getattr(quantization, config)(**settings))
    return model.eval()


def layers(model: nn.Module) -> list[QuantizedLinear]:
    copied = with_quantized_linears(model)
    assert copied.left == {}
    found = [copied.model.get_submodule(name) for name in ("q", "k")]
    assert all(isinstance(layer, QuantizedLinear) for layer in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_dequantizes_to_the_same_bits(kind: str, double: bool, dtype: torch.dtype) -> None:
    model = bitsandbytes(dtype, quant_type=kind, compress_statistics=double, compute_dtype=torch.float32)
    functional = pytest.importorskip("bitsandbytes.functional")
    for own, layer in zip(layers(model), (model.q, model.k), strict=True):
        assert own.kind == kind
        wanted = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert wanted.dtype == own.dtype == dtype
        assert torch.equal(own.quantized.dequantize(), wanted)
        state = copy.copy(layer.weight.quant_state)
        state.dtype = torch.float32
        assert torch.equal(
            own.quantized.dequantize(torch.float32), functional.dequantize_4bit(layer.weight.data, state)
        )


def test_codes_stored_as_bfloat16_are_the_same_bytes() -> None:
    model = bitsandbytes(quant_type="nf4", quant_storage=torch.bfloat16)
    functional = pytest.importorskip("bitsandbytes.functional")
    for own, layer in zip(layers(model), (model.q, model.k), strict=True):
        assert layer.weight.dtype == torch.bfloat16
        codes, state = layer.weight.data.view(torch.uint8), layer.weight.quant_state
        assert torch.equal(own.quantized.dequantize(), functional.dequantize_4bit(codes, state))


def test_codes_that_the_cpu_kernel_has_reordered_come_back() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    model = bitsandbytes(torch.bfloat16, quant_type="nf4")
    before = [own.quantized for own in layers(model)]
    for layer in (model.q, model.k):
        weight = layer.weight
        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    for own, then in zip(layers(model), before, strict=True):
        assert torch.equal(own.codes, then.codes)
        assert torch.equal(own.scales, then.scales.to(torch.bfloat16).float())
        assert "rounded to bfloat16" in own.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
def test_torchaos_integers_dequantize_to_the_same_bits(dtype: torch.dtype, bits: int, mapping: str) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import MappingType, PerGroup

    settings = {"weight_dtype": getattr(torch, f"int{bits}"), "granularity": PerGroup(32)}
    model = torchao("IntxWeightOnlyConfig", dtype, **settings, mapping_type=MappingType[mapping])
    for own, layer in zip(layers(model), (model.q, model.k), strict=True):
        assert torch.equal(own.quantized.dequantize(), layer.weight.dequantize())
        assert own.block == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchaos_eight_bits_a_row_do(dtype: torch.dtype) -> None:
    model = torchao("Int8WeightOnlyConfig", dtype)
    for own, layer in zip(layers(model), (model.q, model.k), strict=True):
        assert torch.equal(own.quantized.dequantize(), layer.weight.dequantize())
        assert (own.bits, own.block) == (8, 128)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_of_compressed_tensors_is_read_by_its_parts(symmetric: bool) -> None:
    parts, expected = compressed(64, 96, symmetric=symmetric)
    model = nn.Sequential(nn.Linear(96, 64))
    layer = model[0]
    del layer._parameters["weight"]
    for name, tensor in parts.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    weights = SimpleNamespace(num_bits=4)
    layer.quantization_scheme = SimpleNamespace(weights=weights, input_activations=None, output_activations=None)
    copied = with_quantized_linears(model)
    assert torch.equal(copied.model[0].quantized.dequantize(torch.float32), expected)  # type: ignore[index]
    layer.quantization_scheme.input_activations = object()
    assert "activations" in with_quantized_linears(model).left["0"]
    layer.quantization_scheme.input_activations = None
    del layer._parameters["weight_scale"]
    assert "not that of format 'pack-quantized'" in with_quantized_linears(model).left["0"]


def test_the_users_model_stays_as_it_is() -> None:
    model = bitsandbytes(quant_type="nf4", compute_dtype=torch.float32)
    x = torch.randn(3, 128)
    before, parameters = model(x), list(model.parameters())
    kinds = [type(module) for module in model.modules()]
    graph = flora_fx.capture(model, x)
    torch.testing.assert_close(graph(x), before, rtol=2e-2, atol=2e-2)  # its kernel on a CPU computes in bfloat16
    assert [type(module) for module in model.modules()] == kinds
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(x), before)
    assert graph.get_parameter("k.bias") is model.k.bias


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_verify_compares_a_model_with_its_graph_by_what_its_codes_stand_for(library: str) -> None:
    model = bitsandbytes(quant_type="nf4") if library == "bitsandbytes" else torchao("Int8WeightOnlyConfig")
    x = torch.randn(3, 128)
    assert flora_fx.verify(model, flora_fx.fuse(flora_fx.capture(model, x)), x).max_rel < 1e-12


def test_what_computes_is_float64_over_the_dequantized_weight() -> None:
    model = bitsandbytes(quant_type="nf4")
    x = torch.randn(3, 128, dtype=torch.float64)
    q, k = (layer.quantized.dequantize(torch.float32).double() for layer in layers(model))
    wanted = torch.cat([torch.tanh(x @ q.t()), x @ k.t() + model.k.bias.double()], -1)
    graph = flora_fx.capture(model, x.float())
    reference = nn.Module()
    reference.forward = lambda _: wanted  # type: ignore[method-assign]
    assert flora_fx.verify(reference, graph, x.float()).max_rel < 1e-6  # x was rounded
    with_quantized_linears(model).model(x)
    torch.testing.assert_close(with_quantized_linears(model).model(x), wanted, rtol=1e-6, atol=1e-6)


def test_layers_that_share_a_weight_share_it() -> None:
    model = bitsandbytes(quant_type="nf4")
    model.k.weight = model.q.weight
    q, k = layers(model)
    assert q.codes is k.codes


def test_hooks_and_the_mode_come_along() -> None:
    model = bitsandbytes(quant_type="nf4").train()
    seen = []
    model.q.register_forward_hook(lambda *_: seen.append("q"))
    copied = with_quantized_linears(model).model
    copied(torch.randn(2, 128))
    assert seen == ["q"]
    assert all(module.training for module in copied.modules())


class _Weight(Tensor):
    """A tensor of another library's class."""


def _weighted(name: str, module: str = "torchao.of.tests") -> nn.Module:
    kind = type(name, (_Weight,), {"__module__": module})
    model = nn.Sequential(nn.Linear(32, 16))
    model[0].weight = nn.Parameter(torch.randn(16, 32).as_subclass(kind), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Int4Tensor", "float zero points"),
        ("Int4TilePackedTo4dTensor", "float zero points"),
        ("Float8Tensor", "floating point of 8 or 4 bits"),
        ("NVFP4Tensor", "floating point of 8 or 4 bits"),
        ("SomethingNewTensor", "torchao's SomethingNewTensor is not read"),
    ],
)
def test_tensors_that_cannot_be_held_are_told(name: str, told: str) -> None:
    copied = with_quantized_linears(_weighted(name))
    assert told in copied.left["0"]
    assert "dequantize()" in copied.told()


@pytest.mark.parametrize(
    ("name", "module", "told"),
    [
        ("Linear8bitLt", "bitsandbytes.nn", "LLM.int8"),
        ("HQQLinear", "hqq.core", "float zero points"),
        ("QuantizedLinear", "aqlm.inference", "vectors"),
        ("TorchQuantLinear", "gptqmodel.nn_modules", "load_model reads its checkpoint"),
        ("EetqLinear", "transformers.integrations.eetq", "EETQ"),
    ],
)
def test_layers_that_cannot_be_held_are_told(name: str, module: str, told: str) -> None:
    layer = type(name, (nn.Linear,), {"__module__": module})(32, 16)
    copied = with_quantized_linears(nn.Sequential(layer))
    assert told in copied.left["0"]


def test_activations_that_are_quantized_too_are_told() -> None:
    pytest.importorskip("torchao")
    model = torchao("Int8DynamicActivationIntxWeightConfig")
    assert all("activations" in why for why in with_quantized_linears(model).left.values())
    assert set(with_quantized_linears(model).left) == {"q", "k"}


def test_float_zero_points_are_told() -> None:
    model = torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4)
    weight = model.q.weight
    weight.zero_point = torch.full(weight.scale.shape, 0.25)
    assert "float zero points" in with_quantized_linears(model).left["q"]


def test_blocks_go_across_rows_as_they_were_quantized() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(96, 64, bias=False, quant_type="nf4")
    original = layer.weight.data.clone()
    layer = layer.to("cpu")
    found: Any = with_quantized_linears(nn.Sequential(layer)).model[0]  # type: ignore[index]
    # bitsandbytes' CPU kernel takes each row's blocks for whole (0.50.2); flattened it is told the same as on a GPU.
    state = copy.copy(layer.weight.quant_state)
    state.shape = torch.Size([1, 64 * 96])
    wanted = bnb.functional.dequantize_4bit(layer.weight.data, state).reshape(64, 96)
    assert torch.equal(found.quantized.dequantize(), wanted)
    assert (wanted - original).abs().max() < 0.2 * original.abs().max()


def test_a_last_block_that_is_not_whole_is_told() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(6, 5, quant_type="nf4").to("cpu")
    assert "not whole blocks of 5 × 6" in with_quantized_linears(nn.Sequential(layer)).left["0"]


def test_a_dora_beside_it_is_told() -> None:
    peft = pytest.importorskip("peft")
    model = bitsandbytes(quant_type="nf4", compute_dtype=torch.float32)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q"], use_dora=True))
    assert "takes the norms of its weight" in with_quantized_linears(adapted).left["base_model.model.q.base_layer"]
    with pytest.raises(flora_fx.CaptureError, match="takes the norms of its weight"):
        flora_fx.capture(adapted, torch.randn(2, 128))


def test_pefts_layers_around_them_are_not_taken_for_them() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"), nn.Linear(32, 8))
    model.is_loaded_in_8bit = True
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    assert set(with_quantized_linears(adapted).left) == {"base_model.model.0.base_layer"}


def test_what_is_not_quantized_yet_is_told() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    assert "not quantized it yet" in with_quantized_linears(nn.Sequential(layer)).left["0"]


def test_an_embedding_of_torchaos_tensors_is_no_linear_layer() -> None:
    model = torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4)
    table = nn.Embedding(64, 128)
    table.weight = model.q.weight
    assert with_quantized_linears(nn.Sequential(table)).left["0"] == "a Embedding is no linear layer"


def test_a_quantized_embedding_is_no_linear_layer() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Embedding4bit(64, 64, quant_type="nf4").to("cpu"))
    assert "embedding" in with_quantized_linears(model).left["0"]


def test_a_capture_that_fails_says_which_layers_it_was() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    with pytest.raises(flora_fx.CaptureError, match=r"LLM\.int8 quantizes its activations.*dequantize\(\)"):
        flora_fx.capture(nn.Sequential(layer), torch.randn(2, 64))
