"""Small checkpoints, made from configs on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from .running import invoke

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**changes: int) -> LlamaForCausalLM:
    """Two layers, grouped queries, no two widths equal."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def save_lora(model: torch.nn.Module, path: Path, **changes: object) -> Path:
    """A LoRA on all projections whose B is not zero, saved as PEFT saves it."""
    config = {"r": 4, "lora_alpha": 12, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**(config | changes)))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(path)
    return path


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    return save_lora(llama(), tmp_path / "adapter")


@pytest.fixture
def encoder_dir(tmp_path: Path) -> Path:
    config = BertConfig(vocab_size=96, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter exported through the command line, once for all tests; no tokenizer."""
    root = tmp_path_factory.mktemp("export")
    llama().save_pretrained(root / "model")
    save_lora(llama(), root / "adapter")
    result = invoke("export", "--model", root / "model", "--adapter", root / "adapter", "--output", root / "onnx")
    assert result.exit_code == 0, result.output
    return root / "onnx"
