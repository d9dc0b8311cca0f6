"""A small causal LM with several LoRAs, in a model and on disk, and the tokens that PyTorch generates with each."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from torch import Tensor

__all__ = ["ADAPTERS", "EXPORTED", "VOCAB", "adapted", "base", "expected_tokens"]

VOCAB = 97
EXPORTED = "exported"
ADAPTERS: dict[str, dict[str, Any]] = {
    EXPORTED: {"r": 6, "lora_alpha": 7, "target_modules": "all-linear"},
    "same": {"r": 6, "lora_alpha": 9, "target_modules": "all-linear"},
    "lower": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "fewer": {"r": 5, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
}


def base(layers: int = 1) -> Any:
    """A random Llama whose heads GroupQueryAttention takes; its layers say more than the token itself."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    model: Any = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (0.3 if "emb" in name else 4.0) / parameter.shape[-1] ** 0.5)
    return model


def adapted(*names: str, layers: int = 1) -> Any:
    """The base with LoRAs of `ADAPTERS`, B not zero; the first is active."""
    first, *others = names or (EXPORTED,)
    model: Any = peft.get_peft_model(base(layers), _lora(first), adapter_name=first).eval()
    for name in others:
        model.add_adapter(name, _lora(name))
    model.set_adapter(first)
    return model


def expected_tokens(model: Any, adapter: str, prompt: Tensor, count: int) -> Tensor:
    """What PyTorch generates, greedily."""
    model.set_adapter(adapter)
    plain = transformers.GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
    tokens: Tensor = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=plain)
    return tokens


def _lora(name: str) -> peft.LoraConfig:
    return peft.LoraConfig(**ADAPTERS[name], init_lora_weights=False)
