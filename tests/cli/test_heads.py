"""A checkpoint loads as the class that it says it is, with its head; no weight is dropped and none is made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flora_fx.checkpoint import load_model
from flora_fx.errors import AdapterError
from flora_fx.quantized import QuantizedLinear

TEXT = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def bert(labels: int = 3) -> Any:
    return transformers.BertConfig(**TEXT, num_labels=labels)


def llama(labels: int = 3) -> Any:
    return transformers.LlamaConfig(**TEXT, num_key_value_heads=2, num_labels=labels, pad_token_id=0)


def vit(labels: int = 4) -> Any:
    return transformers.ViTConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_labels=labels,
    )


def wav2vec2() -> Any:
    return transformers.Wav2Vec2Config(
        **{**TEXT, "num_hidden_layers": 1},
        conv_dim=(8, 8),
        conv_kernel=(3, 2),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )


def spectrogram() -> Any:
    return transformers.ASTConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_length=24,
        num_mel_bins=16,
        num_labels=5,
    )


def qwen3_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "rope_scaling": rope}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 24}
    return transformers.Qwen3VLConfig(
        text_config=text,
        vision_config={**vision, "patch_size": 4, "deepstack_visual_indexes": [0]},
        image_token_id=56,
        video_token_id=57,
        vision_start_token_id=58,
        vision_end_token_id=59,
    )


def gemma3() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Gemma3Config(
        text_config={**TEXT, "num_key_value_heads": 2, "head_dim": 8},
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=60,
    )


def made(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def adapted(model: nn.Module, **settings: Any) -> Any:
    """A PEFT model in eval mode whose B is not zero."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **settings)).eval()


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        found = model.double()(**{key: x.double() if x.is_floating_point() else x for key, x in inputs.items()})
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def same(loaded: nn.Module, expected: nn.Module, inputs: dict[str, Tensor]) -> None:
    assert not loaded.training
    found, wanted = outputs(loaded, inputs), outputs(expected, inputs)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


TOKENS = {"input_ids": IDS}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}
SOUND = {"input_values": torch.linspace(-1, 1, 2 * 400).reshape(2, 400).sin()}
MELS = {"input_values": torch.linspace(-1, 1, 2 * 24 * 16).reshape(2, 24, 16)}
OWN: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "BertForSequenceClassification": (bert, TOKENS),
    "BertForTokenClassification": (bert, TOKENS),
    "BertForQuestionAnswering": (lambda: bert(2), TOKENS),
    "BertForMaskedLM": (bert, TOKENS),
    "BertForMultipleChoice": (bert, {"input_ids": IDS[:, None].repeat(1, 3, 1)}),
    "BertForPreTraining": (bert, TOKENS),
    "LlamaForSequenceClassification": (llama, TOKENS),
    "LlamaForTokenClassification": (llama, TOKENS),
    "ViTForImageClassification": (vit, PIXELS),
    "Wav2Vec2ForCTC": (wav2vec2, SOUND),
    "ASTForAudioClassification": (spectrogram, MELS),
    "Qwen3VLForConditionalGeneration": (qwen3_vl, TOKENS),
    "Gemma3ForConditionalGeneration": (gemma3, TOKENS),
}


@pytest.mark.parametrize("name", OWN)
def test_a_checkpoint_is_what_it_says(name: str, tmp_path: Path) -> None:
    config, inputs = OWN[name]
    model = made(name, config())
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    same(loaded, model, inputs)


# --- the adapter knows better -----------------------------------------------------------------------------

# The base's class, the trained one's, its config, what the adapter is told, whether the base's layers are its own.
TRAINED: dict[str, tuple[str, str, Callable[[], Any], dict[str, Any], dict[str, Tensor]]] = {
    "a classifier on a causal LM": (
        *("LlamaForCausalLM", "LlamaForSequenceClassification", llama),
        {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"]},
        TOKENS,
    ),
    "tokens on a masked LM": (
        *("BertForMaskedLM", "BertForTokenClassification", bert),
        {"task_type": "TOKEN_CLS", "target_modules": ["query", "value"]},
        TOKENS,
    ),
    "answers on a masked LM": (
        *("BertForMaskedLM", "BertForQuestionAnswering", bert),
        {"task_type": "QUESTION_ANS", "target_modules": ["query", "value"]},
        TOKENS,
    ),
    "images, by the class that was trained": (
        *("ViTModel", "ViTForImageClassification", vit),
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
        PIXELS,
    ),
    "features of a masked LM": (
        *("BertForMaskedLM", "BertModel", bert),
        {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query", "value"]},
        TOKENS,
    ),
    "speech": (
        *("Wav2Vec2ForCTC", "Wav2Vec2ForCTC", wav2vec2),
        {"target_modules": ["q_proj", "v_proj"]},
        SOUND,
    ),
    "a vision-language model": (
        *("Qwen3VLForConditionalGeneration", "Qwen3VLForConditionalGeneration", qwen3_vl),
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]},
        TOKENS,
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_an_adapter_says_what_it_was_trained_for(case: str, tmp_path: Path) -> None:
    first, second, config, settings, inputs = TRAINED[case]
    base = config()
    base.num_labels = 2  # the head has others, but for the ends of an answer
    made(first, base).save_pretrained(tmp_path / "base")
    labels = 2 if settings.get("task_type") == "QUESTION_ANS" else 5
    trained = getattr(transformers, second).from_pretrained(tmp_path / "base", num_labels=labels)
    if second == "BertModel":
        trained.pooler = None
    model = adapted(trained, **settings)
    model.save_pretrained(tmp_path / "lora")
    loaded = load_model(tmp_path / "base", tmp_path / "lora")
    assert type(loaded) is type(model)
    assert type(loaded.get_base_model()).__name__ == second
    same(loaded, model, inputs)


def test_a_head_with_other_labels_than_the_bases(tmp_path: Path) -> None:
    made("BertForSequenceClassification", bert(2)).save_pretrained(tmp_path / "base")
    trained = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=7, ignore_mismatched_sizes=True
    )
    model = adapted(trained, task_type="SEQ_CLS", target_modules=["query"])
    model.save_pretrained(tmp_path / "lora")
    loaded = load_model(tmp_path / "base", tmp_path / "lora")
    assert loaded.config.num_labels == 7
    same(loaded, model, TOKENS)


def test_a_task_that_is_asked_for_replaces_the_head(tmp_path: Path) -> None:
    model = made("LlamaForSequenceClassification", llama())
    model.save_pretrained(tmp_path)
    same(load_model(tmp_path, task="encoder"), model.model, TOKENS)


def test_a_base_in_4_bits(tmp_path: Path) -> None:
    """As QLoRA trains on: the adapter lies beside it, and the base holds the codes that were saved."""
    config = transformers.LlamaConfig(**TEXT | {"hidden_size": 64, "intermediate_size": 128}, num_key_value_heads=2)
    made("LlamaForCausalLM", config).save_pretrained(tmp_path / "base")
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantized = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=bits, device_map="cpu"
    )
    quantized.save_pretrained(tmp_path / "quantized")
    model = adapted(quantized, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path / "lora")
    loaded = load_model(tmp_path / "quantized", tmp_path / "lora")
    found, wanted = loaded.state_dict(), model.state_dict()
    adapter = [name for name in wanted if "lora_" in name]
    assert len(adapter) == 2 * 2 * 2  # A and B of two projections of two layers
    assert all(found[name].equal(wanted[name]) for name in adapter)
    layers = [name for name, layer in loaded.named_modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == 7 * 2
    for name in layers:
        parameter = model.get_submodule(name).weight
        codes = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
        assert loaded.get_submodule(name).quantized.dequantize(codes.dtype).equal(codes)


# --- what may be left out ---------------------------------------------------------------------------------


def rewrite(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_pretraining_left_beside_a_masked_lm(tmp_path: Path) -> None:
    """As in the first BERT: config.json names the masked LM, and the file has a pooler and a next-sentence head."""
    whole = made("BertForPreTraining", bert())
    whole.save_pretrained(tmp_path)
    rewrite(tmp_path, architectures=["BertForMaskedLM"])
    loaded = load_model(tmp_path)
    assert type(loaded).__name__ == "BertForMaskedLM"
    wanted = outputs(whole, TOKENS)["prediction_logits"]
    torch.testing.assert_close(outputs(loaded, TOKENS)["logits"], wanted, rtol=0, atol=0)


def test_what_transformers_knows_to_be_of_no_use(tmp_path: Path) -> None:
    model = made("LlamaForCausalLM", llama())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same(load_model(tmp_path), model, TOKENS)


def test_an_architecture_by_an_older_name(tmp_path: Path) -> None:
    model = made("LlamaForCausalLM", llama())
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, architectures=["LLaMAForCausalLM"])
    same(load_model(tmp_path), model, TOKENS)
    rewrite(tmp_path, architectures=None)
    with pytest.raises(AdapterError, match=r"1 weights of the checkpoint have no place in LlamaModel \(lm_head"):
        load_model(tmp_path)


# --- what is refused --------------------------------------------------------------------------------------


def test_a_head_that_config_json_does_not_name(tmp_path: Path) -> None:
    made("BertForTokenClassification", bert()).save_pretrained(tmp_path)
    rewrite(tmp_path, architectures=["BertModel"])
    said = r"2 weights .* no place in BertModel \(classifier\.bias, classifier\.weight\).*'token-classification'"
    with pytest.raises(AdapterError, match=said):
        load_model(tmp_path)
    assert type(load_model(tmp_path, task="token-classification")).__name__ == "BertForTokenClassification"


def test_weights_of_nothing(tmp_path: Path) -> None:
    made("LlamaForCausalLM", llama()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.extra.weight"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = r"1 weights .* no place in LlamaForCausalLM \(model\.layers\.0\.mlp\.extra\.weight\).*save it again"
    with pytest.raises(AdapterError, match=said):
        load_model(tmp_path)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.extra\.weight.*leave out what asked for .*task='encoder'"):
        load_model(tmp_path, task="encoder")


def test_weights_that_were_random_in_training_and_not_saved(tmp_path: Path) -> None:
    """BERT's classifier reads a pooler, which a masked LM does not have."""
    made("BertForMaskedLM", bert()).save_pretrained(tmp_path / "base")
    trained = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = adapted(trained, task_type="SEQ_CLS", target_modules=["query"])
    model.save_pretrained(tmp_path / "lora")
    said = r"2 weights of BertForSequenceClassification, which the adapter's task_type .*bert\.pooler\.dense"
    with pytest.raises(AdapterError, match=said):
        load_model(tmp_path / "base", tmp_path / "lora")
    trained.save_pretrained(tmp_path / "trained")  # the remedy
    model.unload().save_pretrained(tmp_path / "trained")
    same(load_model(tmp_path / "trained", tmp_path / "lora"), adapted_again(tmp_path), TOKENS)


def adapted_again(place: Path) -> Any:
    base = transformers.BertForSequenceClassification.from_pretrained(place / "trained")
    return peft.PeftModel.from_pretrained(base, place / "lora").eval()


def test_a_config_of_other_sizes(tmp_path: Path) -> None:
    made("LlamaForCausalLM", llama()).save_pretrained(tmp_path)
    rewrite(tmp_path, intermediate_size=48)
    with pytest.raises(AdapterError, match=r"mlp\.down_proj\.weight is 24 × 40 in the checkpoint and 24 × 48 in"):
        load_model(tmp_path)


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    made("LlamaForCausalLM", llama()).save_pretrained(tmp_path)
    rewrite(tmp_path, architectures=["LlamaForChess"])
    with pytest.raises(AdapterError, match=r"config\.json names LlamaForChess, which transformers \S+ does not have"):
        load_model(tmp_path)
    assert type(load_model(tmp_path, task="causal-lm")).__name__ == "LlamaForCausalLM"  # the remedy


def test_a_task_that_the_model_is_not_for(tmp_path: Path) -> None:
    made("LlamaForCausalLM", llama()).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"no model for task 'ctc' with a LlamaConfig.* is a LlamaForCausalLM"):
        load_model(tmp_path, task="ctc")


def test_an_adapter_of_another_class_of_the_model(tmp_path: Path) -> None:
    made("BertForSequenceClassification", bert()).save_pretrained(tmp_path / "base")
    model = adapted(made("BertForSequenceClassification", bert()), task_type="SEQ_CLS", target_modules=["query"])
    model.save_pretrained(tmp_path / "lora")
    said = r"one of BertForSequenceClassification or .*, and the model is loaded as BertModel \(task='encoder'\)"
    with pytest.raises(AdapterError, match=said):
        load_model(tmp_path / "base", tmp_path / "lora", task="encoder")


def test_a_class_that_cannot_be_made(tmp_path: Path) -> None:
    made("LlamaForCausalLM", llama()).save_pretrained(tmp_path / "base")
    adapted(made("LlamaForCausalLM", llama()), task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(
        tmp_path / "lora"
    )
    rewrite(tmp_path / "base", hidden_act="none such")
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM cannot be made with this config .*none such"):
        load_model(tmp_path / "base", tmp_path / "lora")
    with pytest.raises(AdapterError, match=r"transformers cannot load this model as LlamaForCausalLM .*none such"):
        load_model(tmp_path / "base")


# --- adapters that PEFT itself cannot load ----------------------------------------------------------------


def changed_adapter(place: Path, **settings: Any) -> tuple[Path, Path]:
    made("LlamaForCausalLM", llama()).save_pretrained(place / "base")
    adapted(made("LlamaForCausalLM", llama()), task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(
        place / "lora"
    )
    file = place / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return place / "base", place / "lora"


def test_a_package_that_peft_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("The required package 'scipy' is not installed.")

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", missing)
    base, lora = changed_adapter(tmp_path, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    with pytest.raises(AdapterError, match=r"adapter_config\.json: PEFT needs a package .*'scipy'.*='loftq' comp"):
        load_model(base, lora)


def test_a_setting_that_peft_refuses(tmp_path: Path) -> None:
    base, lora = changed_adapter(tmp_path, init_lora_weights="none such")
    with pytest.raises(AdapterError, match=r"does not fit LlamaForCausalLM \(.*none such.*task_type CAUSAL_LM"):
        load_model(base, lora)


def test_another_rank_than_adapter_config_says(tmp_path: Path) -> None:
    base, lora = changed_adapter(tmp_path, r=8)
    said = r"q_proj\.lora_A\.weight is 3 × 24, and with adapter_config\.json at rank 8 it has to be 8 × 24"
    with pytest.raises(AdapterError, match=said):
        load_model(base, lora)


def test_a_head_that_adapter_config_asks_for(tmp_path: Path) -> None:
    base, lora = changed_adapter(tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"1 tensors that adapter_config\.json asks for are missing .*lm_head\.w"):
        load_model(base, lora)
