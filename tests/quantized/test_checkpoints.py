"""Quantized checkpoints on disk, with an adapter beside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flora_fx
from flora_fx.checkpoint import load_model
from flora_fx.quantized import QuantizedLinear, dequantize

from . import checkpoints
from .checkpoints import change_config, tiny, write

IDS = torch.arange(2, 16).reshape(2, 7)
FORMATS: dict[str, Any] = {
    "GPTQ": lambda: checkpoints.gptq(),
    "GPTQ v2, act-order": lambda: checkpoints.gptq(v2=True, act_order=True),
    "AWQ": checkpoints.awq,
    "compressed-tensors": lambda: checkpoints.compressed(symmetric=False),
    "bitsandbytes": lambda: checkpoints.bitsandbytes(),
}


def adapter(folder: Path, base: nn.Module, **settings: Any) -> Any:
    """A LoRA with a rank for each projection, saved; and the model with it, over the dequantized base, in float64."""
    ranks = {"q_proj": 3, "k_proj": 2, "v_proj": 4, "down_proj": 5}
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=7, rank_pattern=ranks, target_modules=modules, **settings
    )
    torch.manual_seed(5)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
        if "lora_" in name:
            parameter.data = parameter.data.float().double()
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", FORMATS)
def test_a_base_and_its_adapter_compute_what_float64_does(name: str, tmp_path: Path) -> None:
    if name == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    wanted = adapter(tmp_path / "lora", write(tiny(), tmp_path / "base", *FORMATS[name]()))
    model = load_model(tmp_path / "base", tmp_path / "lora", dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14
    assert all(name.split()[0] in layer.source for layer in layers)
    for own, plain in zip(layers, (m.base_layer for m in wanted.modules() if hasattr(m, "base_layer")), strict=True):
        assert torch.equal(own.quantized.dequantize(torch.float32).double(), plain.weight)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.no_grad():
        expected = wanted(input_ids=IDS).logits
        found = model(input_ids=IDS).logits
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    graph = flora_fx.capture(model, input_ids=IDS, use_cache=False)
    fused = flora_fx.fuse(graph)
    report = flora_fx.report(fused)
    assert len(report.fused) == 14
    operators = [n for n in fused.graph.nodes if n.target is torch.ops.flora_fx.quantized_linear.default]
    assert len(operators) == 2 * 4
    assert (fused(input_ids=IDS, use_cache=False).logits - expected).abs().max() < 2e-5 * expected.abs().max()


def test_dequantized_it_is_a_plain_model_into_which_an_adapter_merges(tmp_path: Path) -> None:
    wanted = adapter(tmp_path / "lora", write(tiny(), tmp_path / "base", *checkpoints.gptq(act_order=True)))
    model: Any = load_model(tmp_path / "base", tmp_path / "lora", dtype=torch.float32)
    plain: Any = dequantize(model, torch.float64).double()
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    with torch.no_grad():
        expected = wanted(input_ids=IDS).logits
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(plain.merge_and_unload()(input_ids=IDS).logits, expected, rtol=1e-9, atol=1e-9)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_nobody_is_told_that_its_parts_have_no_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tiny(), tmp_path, *checkpoints.gptq())
    capfd.readouterr()
    load_model(tmp_path)
    assert "qweight" not in capfd.readouterr().err


def test_neither_gptqmodel_nor_optimum_is_imported(tmp_path: Path) -> None:
    write(tiny(), tmp_path, *checkpoints.gptq())
    load_model(tmp_path)
    assert sys.modules.keys().isdisjoint({"gptqmodel", "optimum", "auto_gptq", "compressed_tensors"})


def test_the_rest_keeps_the_checkpoints_dtype_and_so_does_the_adapter(tmp_path: Path) -> None:
    base = write(tiny().half(), tmp_path / "base", *checkpoints.gptq())
    adapter(tmp_path / "lora", base)
    model = load_model(tmp_path / "base", tmp_path / "lora")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    model = load_model(tmp_path / "base", tmp_path / "lora", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {m.scales.dtype for m in model.modules() if isinstance(m, QuantizedLinear)} == {torch.float16}


def test_the_model_is_of_its_own_class_and_generates(tmp_path: Path) -> None:
    write(tiny(), tmp_path, *checkpoints.gptq())
    model: Any = load_model(tmp_path)
    import transformers

    assert type(model) is transformers.LlamaForCausalLM
    assert not hasattr(model.config, "quantization_config")
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_a_bias_that_is_zero_is_dropped_and_another_is_added(tmp_path: Path) -> None:
    write(tiny(), tmp_path, *checkpoints.gptq())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.arange(64.0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model: Any = load_model(tmp_path)
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    assert first.bias is None
    assert torch.equal(second.bias, torch.arange(64.0))


def test_biases_that_the_model_has_are_loaded(tmp_path: Path) -> None:
    base: Any = tiny(attention_bias=True)
    for layer in base.model.layers:
        layer.self_attn.q_proj.bias.data.normal_()
    wanted = write(base, tmp_path, *checkpoints.compressed())
    model = load_model(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        found, expected = model(input_ids=IDS).logits, wanted(input_ids=IDS).logits
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_gpt2s_transposed_layers_are_linear_layers(tmp_path: Path) -> None:
    import transformers

    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 61, "n_positions": 32}
    base: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    base.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    encoder, settings = checkpoints.gptq()
    parts, weight = encoder(192, 64, 1)
    name = "transformer.h.0.attn.c_attn"
    del tensors[f"{name}.weight"]
    tensors.update({f"{name}.{key}": value for key, value in parts.items()})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, quantization_config=settings)
    base.get_submodule(name).weight.data = weight.t().contiguous()
    model = load_model(tmp_path)
    assert isinstance(model.get_submodule(name), QuantizedLinear)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, base(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"checkpoint_format": "marlin"}, "laid out for one kernel"),
        ({"pack_dtype": "int16"}, "not into int32"),
        ({"dynamic": {"x": {}}}, "differ from layer to layer"),
        ({"bits": 8}, "cannot be held as it is"),
        ({"group_size": 16}, "cannot be held as it is"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemm' is read"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "'pack-quantized' is read"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "no layer of it is"),
    ],
)
def test_settings_that_say_otherwise_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    encoder, settings = checkpoints.gptq()
    write(tiny(), tmp_path, encoder, settings | changes)
    with pytest.raises(flora_fx.AdapterError, match=told) as error:
        load_model(tmp_path)
    assert "in floating point" in str(error.value)


@pytest.mark.parametrize("what", ["input_activations", "kv_cache_scheme"])
def test_activations_that_are_quantized_too_are_refused(what: str, tmp_path: Path) -> None:
    encoder, settings = checkpoints.compressed()
    place = settings if what == "kv_cache_scheme" else settings["config_groups"]["group_0"]
    place[what] = {"num_bits": 8}
    write(tiny(), tmp_path, encoder, settings)
    with pytest.raises(flora_fx.AdapterError, match="too"):
        load_model(tmp_path)


def _changed(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    for key, change in changes.items():
        name = next(name for name in sorted(tensors) if name.endswith(key))
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"qzeros": lambda t: torch.full_like(t, -1)}, "some kernels take it as 16"),
        ({"g_idx": lambda t: torch.zeros_like(t)}, "not all of 32"),
        ({"qzeros": None}, "has no qzeros; the checkpoint is half written"),
        ({"scales": lambda t: t * torch.nan}, "NaN or infinite"),
    ],
)
def test_layers_that_cannot_be_held_are_refused_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    write(tiny(), tmp_path, *checkpoints.gptq())
    _changed(tmp_path, **changes)
    with pytest.raises(flora_fx.AdapterError, match=told) as error:
        load_model(tmp_path)
    assert "model.layers.0.mlp.down_proj" in str(error.value)


def test_another_models_config_is_refused(tmp_path: Path) -> None:
    write(tiny(), tmp_path, *checkpoints.gptq())
    change_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(flora_fx.AdapterError, match="7 quantized layers of the checkpoint are no linear layers"):
        load_model(tmp_path)
    change_config(tmp_path, num_hidden_layers=2, intermediate_size=128)
    with pytest.raises(flora_fx.AdapterError, match="64 × 96 in the checkpoint and 64 × 128"):
        load_model(tmp_path)


def test_a_quantized_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    write(tiny(), tmp_path, *checkpoints.gptq())
    parts, _ = checkpoints.gptq()[0](96, 64, 1)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors.update({f"lm_head.{key}": value for key, value in parts.items()})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(flora_fx.AdapterError, match=r"lm_head is quantized.*the embedding's"):
        load_model(tmp_path)


def test_a_dora_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    wanted = adapter(tmp_path / "lora", write(tiny(), tmp_path / "base", *checkpoints.gptq()), use_dora=True)
    with pytest.raises(flora_fx.AdapterError, match="norms of its base's weights"):
        load_model(tmp_path / "base", tmp_path / "lora")
    plain = dequantize(load_model(tmp_path / "base", dtype=torch.float32), torch.float32)
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    with torch.no_grad():
        found, expected = model(input_ids=IDS).logits, wanted(input_ids=IDS).logits
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_a_whole_weight_for_a_quantized_layer_is_refused(tmp_path: Path) -> None:
    base = write(tiny(), tmp_path / "base", *checkpoints.gptq())
    adapter(tmp_path / "lora", base)
    path = tmp_path / "lora/adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 64)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(flora_fx.AdapterError, match=r"whole weights of layers.*modules_to_save"):
        load_model(tmp_path / "base", tmp_path / "lora")
