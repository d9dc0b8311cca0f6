"""`flora-fx inspect`: the report, of every kind of model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .running import invoke


def test_inspect_prints_the_report(model_dir: Path, adapter_dir: Path) -> None:
    result = invoke("inspect", "--model", model_dir, "--adapter", adapter_dir)
    assert result.exit_code == 0, result.output
    assert "q_proj" in result.stdout or "qkv" in result.stdout


def test_inspect_json_is_the_report(model_dir: Path, adapter_dir: Path) -> None:
    result = invoke("inspect", "--model", model_dir, "--adapter", adapter_dir, "--json")
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(result.stdout), dict)


def test_inspect_encoder(encoder_dir: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    from .conftest import save_lora

    adapter = save_lora(
        BertModel.from_pretrained(encoder_dir),
        tmp_path / "bert-lora",
        target_modules=["query", "key", "value"],
        task_type="FEATURE_EXTRACTION",
    )
    result = invoke("inspect", "--model", encoder_dir, "--adapter", adapter, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert len(told["fused"]) == 6
    assert told["declines"] == []


def save_seq2seq(place: Path) -> Path:
    """A small T5 and its LoRA."""
    import peft
    import transformers

    from .test_sample_inputs import t5

    model = transformers.T5ForConditionalGeneration(t5())
    model.save_pretrained(place / "t5")
    lora = peft.LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(place / "lora")
    return place


def test_inspect_encoder_decoder(tmp_path: Path) -> None:
    place = save_seq2seq(tmp_path)
    result = invoke("inspect", "--model", place / "t5", "--adapter", place / "lora", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert len(told["fused"]) == 6  # q and v of three attentions
    assert told["declines"] == []


def test_inspect_with_inputs_from_a_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    place = save_seq2seq(tmp_path)
    options = ("inspect", "--model", place / "t5", "--adapter", place / "lora", "--json", "--inputs")
    tokens = torch.ones(2, 4, dtype=torch.int64)
    save_file({"input_ids": tokens, "decoder_input_ids": tokens.clone()}, tmp_path / "inputs.safetensors")
    result = invoke(*options, tmp_path / "inputs.safetensors")
    assert result.exit_code == 0, result.output
    save_file({"input_ids": tokens}, tmp_path / "few.safetensors")
    result = invoke(*options, tmp_path / "few.safetensors")
    assert result.exit_code == 1
    assert "could not trace PeftModelForSeq2SeqLM" in result.stderr
    assert result.stderr.endswith(f"they were read from --inputs {tmp_path / 'few.safetensors'}\n")
    assert "dynamic_shapes" not in result.stderr
    result = invoke(*options, place / "t5" / "config.json")
    assert result.exit_code == 1
    assert "config.json is no safetensors file" in result.stderr.splitlines()[-1]
    result = invoke(*options, tmp_path / "gone.safetensors")
    assert result.exit_code == 1
    assert "gone.safetensors" in result.stderr


def test_inspect_of_inputs_that_cannot_be_made_up(
    model_dir: Path, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "main_input_name", "point_cloud")
    result = invoke("inspect", "--model", model_dir, "--adapter", adapter_dir)
    assert result.exit_code == 1
    assert "reads 'point_cloud', of which its config does not tell the sizes" in result.stderr
    assert "pass your own: --inputs FILE" in result.stderr


def test_inspect_vision_language_model(tmp_path: Path) -> None:
    from .test_heads import adapted, made, qwen3_vl

    name = "Qwen3VLForConditionalGeneration"
    made(name, qwen3_vl()).save_pretrained(tmp_path / "base")
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "k_proj", "v_proj"]}
    adapted(made(name, qwen3_vl()), **lora).save_pretrained(tmp_path / "lora")
    result = invoke("inspect", "--model", tmp_path / "base", "--adapter", tmp_path / "lora", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["declines"] == []
