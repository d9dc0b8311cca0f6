"""Adapters with more tokens than their base: resized where every new row is in the adapter, refused else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from flora_fx.checkpoint import load_model
from flora_fx.errors import AdapterError

TOKENS = torch.tensor([[3, 1, 64, 65], [9, 66, 2, 6]])


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, **sizes, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def trained(place: Path, tied: bool, size: int = 67, embeddings: Any = "auto", **settings: Any) -> Any:
    """A base on disk and an adapter of it that was trained with more tokens; the model of both."""
    llama(tied).save_pretrained(place / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(place / "base")
    model.resize_token_embeddings(size)
    model.save_pretrained(place / "resized")
    targets = settings.pop("target_modules", ["q_proj"])
    lora = peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets, init_lora_weights=False, **settings)
    adapted = peft.get_peft_model(model, lora).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(place / "lora", save_embedding_layers=embeddings)
    return adapted


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.double()(TOKENS).logits


RESIZED: dict[str, tuple[bool, dict[str, Any]]] = {
    "both saved": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "both saved, as they are": (False, {"embeddings": True}),
    "one saved, tied": (True, {"embeddings": True}),
    "rows by their numbers, tied": (True, {"embeddings": False, "trainable_token_indices": [5, 64, 65, 66]}),
    "rows by their numbers, by name": (
        True,
        {"embeddings": False, "trainable_token_indices": {"embed_tokens": [64, 65, 66]}},
    ),
    "a LoRA of the embedding": (False, {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", RESIZED)
def test_resized(case: str, tmp_path: Path) -> None:
    tied, settings = RESIZED[case]
    model = trained(tmp_path, tied, **settings)
    loaded = load_model(tmp_path / "base", tmp_path / "lora")
    assert loaded.config.vocab_size == 67
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_not_resized(tmp_path: Path) -> None:
    """More rows in the base than the adapter changes."""
    model = trained(tmp_path, tied=False, size=64, trainable_token_indices=[5, 63])
    loaded = load_model(tmp_path / "base", tmp_path / "lora")
    tokens = TOKENS % 64
    with torch.no_grad():
        torch.testing.assert_close(loaded.double()(tokens).logits, model.double()(tokens).logits, rtol=0, atol=0)


LOST: dict[str, tuple[bool, dict[str, Any], str]] = {
    "the head's rows": (
        False,
        {"embeddings": False, "trainable_token_indices": [64, 65, 66]},
        r"the adapter has 67 tokens, lm_head\.weight of the base is 64 × 24 and .* 67 × 24, .*rows 64 to 66 of it",
    ),
    "rows between": (
        True,
        {"embeddings": False, "trainable_token_indices": [64, 66]},
        r"model\.embed_tokens\.weight of the base is 64 × 24 and would have to be 67 × 24",
    ),
    "the embedding's rows": (
        False,
        {"embeddings": False, "modules_to_save": ["lm_head"]},
        r"model\.embed_tokens\.weight of the base is 64 × 24 and would have to be 67 × 24",
    ),
    "beside a LoRA of the head": (
        False,
        {"target_modules": ["q_proj", "lm_head"]},
        r"model\.embed_tokens\.weight of the base is 64 × 24 and would have to be 67 × 24",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_rows_that_are_nowhere(case: str, tmp_path: Path) -> None:
    tied, settings, message = LOST[case]
    model = trained(tmp_path, tied, **settings)
    with pytest.raises(AdapterError, match=message):
        load_model(tmp_path / "base", tmp_path / "lora")
    loaded = load_model(tmp_path / "resized", tmp_path / "lora")  # the remedy
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_fewer_rows_than_the_base(tmp_path: Path) -> None:
    trained(tmp_path, tied=False, size=60, modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head\.weight is 60 × 24, and with adapter_config\.json it .* 64 × 24"):
        load_model(tmp_path / "base", tmp_path / "lora")
