"""Small models with adapters, and their exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from flora_fx.export import Decoder, Encoder, ExportResult

VOCAB = 97
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def build(name: str) -> nn.Module:
    """A random model, in training mode, with LoRA on every linear layer: ranks that divide nothing, B not zero."""
    torch.manual_seed(7)
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
        "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=16, tie_word_embeddings=False),
        "mistral": lambda: transformers.MistralConfig(**_LLAMA, sliding_window=6),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **_LLAMA, head_dim=12, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
        ),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=256),
        "tiny": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=1, n_head=3, n_positions=64),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=48,
            max_position_embeddings=256,
        ),
        "bert": lambda: transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
        ),
        "vit": lambda: transformers.ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=80,
            image_size=24,
            patch_size=8,
        ),
    }
    config = configs[name]()
    auto = transformers.AutoModel if name in ("bert", "vit") else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Layers must say more than the token itself, or a greedy sequence repeats one token.
                loud = 0.3 if "emb" in key or "wte" in key or "wpe" in key else 4.0
                parameter.normal_(0, loud / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    lora = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=name in ("gpt2", "tiny")
    )
    return peft.get_peft_model(model, lora).train()


@dataclass(frozen=True)
class Exported:
    """A model, its export, and the export loaded."""

    model: nn.Module
    result: ExportResult
    runner: Any

    @property
    def decoder(self) -> Decoder:
        assert isinstance(self.runner, Decoder)
        return self.runner

    @property
    def encoder(self) -> Encoder:
        assert isinstance(self.runner, Encoder)
        return self.runner

    @property
    def directory(self) -> Path:
        return self.result.directory
