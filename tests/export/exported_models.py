"""Small models with adapters, and their exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
import transformers
from torch import nn

from flora_fx.export import Decoder, Encoder, ExportResult
from flora_fx.export.directory.manifest import _digest
from flora_fx.export.targets import TargetName

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


_WIDE = {
    **_LLAMA,
    "hidden_size": 64,  # heads of 16
    "bos_token_id": 1,
    "eos_token_id": None,  # no token ends a generation
    "pad_token_id": 0,
}
_ROPE = {"rope_theta": 10000.0}
_NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    # Heads of 12, which GroupQueryAttention does not take.
    "llama": lambda: transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
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
    # Heads of 16, which it takes.
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=16, tie_word_embeddings=False),
    # Encoders
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
"""Small models, by name."""

FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": lambda: transformers.LlamaConfig(**_WIDE, tie_word_embeddings=True),
    "Qwen3": lambda: transformers.Qwen3Config(**_WIDE, head_dim=32),
    "Mistral": lambda: transformers.MistralConfig(**_WIDE, sliding_window=6),
    "Phi-3": lambda: transformers.Phi3Config(**_WIDE),
    "Gemma-2": lambda: transformers.Gemma2Config(
        **_WIDE,
        head_dim=16,
        sliding_window=6,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=12.0,
        final_logit_softcapping=0.8,
    ),
}
"""Those that the target "decoder" is made for; Gemma-2's caps are so low that they matter."""

FURTHER: dict[str, Callable[[], Any]] = {
    "Qwen2": lambda: transformers.Qwen2Config(**_WIDE),
    "StarCoder2": lambda: transformers.Starcoder2Config(**_WIDE),
    "SmolLM3": lambda: transformers.SmolLM3Config(**_WIDE, no_rope_layers=[1, 0]),
    "OLMo2": lambda: transformers.Olmo2Config(**_WIDE),
    "Granite": lambda: transformers.GraniteConfig(**_WIDE, attention_multiplier=0.2, residual_multiplier=0.8),
    "Gemma-3": lambda: transformers.Gemma3TextConfig(
        **_WIDE, head_dim=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "Mixtral": lambda: transformers.MixtralConfig(**_WIDE, num_local_experts=2),
    "Cohere": lambda: transformers.CohereConfig(**_WIDE),  # neighbours are rotated together
    "Llama-3": lambda: transformers.LlamaConfig(
        **_WIDE,
        rope_parameters={
            **_ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "YaRN": lambda: transformers.LlamaConfig(
        **_WIDE,
        rope_parameters={**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    # Half of a head is rotated: 16 numbers of 32, which GroupQueryAttention can do, or 8 of 16, which it cannot.
    "GLM": lambda: transformers.GlmConfig(**{**_WIDE, "num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=32),
    "GLM, 8": lambda: transformers.GlmConfig(**_WIDE, head_dim=16),
    "Phi": lambda: transformers.PhiConfig(
        **{**_WIDE, "num_attention_heads": 2, "num_key_value_heads": 2}, partial_rotary_factor=0.5
    ),
    "Phi, 8": lambda: transformers.PhiConfig(**{**_WIDE, "num_key_value_heads": 4}, partial_rotary_factor=0.5),
    "GPT-NeoX": lambda: transformers.GPTNeoXConfig(**_NEOX, rotary_pct=0.5),
    "GPT-NeoX, 8": lambda: transformers.GPTNeoXConfig(**{**_NEOX, "num_attention_heads": 4}, rotary_pct=0.5),
    # Learned positions
    "OPT": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=256,
        eos_token_id=None,
    ),
    "GPT-2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, eos_token_id=None
    ),
}
"""Others that it takes."""

_SEEDS = {"Mistral": 8, "Gemma-2": 12, "OLMo2": 12, "Gemma-3": 15, "GPT-NeoX, 8": 8, "Cohere": 11}
"""With which there is no near tie among the logits of the tests' tokens; 7 for all others."""


def plain(name: str, **changes: Any) -> nn.Module:
    """A random model without adapters, in training mode.

    Args:
        name: a key of `CONFIGS`, `FAMILIES` or `FURTHER`.
        changes: of its config.
    """
    torch.manual_seed(_SEEDS.get(name, 7))
    config = {**CONFIGS, **FAMILIES, **FURTHER}[name]()
    for key, value in changes.items():
        setattr(config, key, value)
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
        if name not in CONFIGS:
            # What pads is never the likeliest, for onnxruntime-genai ends a sequence there where nothing else ends it.
            model.get_output_embeddings().weight[0] = 0
    return model.train()


def build(name: str, **changes: Any) -> nn.Module:
    """As `plain`, with LoRA on every linear layer: ranks that divide nothing, B not zero."""
    model = plain(name, **changes)
    lora = peft.LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules="all-linear",
        init_lora_weights=False,
        fan_in_fan_out=name in ("gpt2", "tiny", "GPT-2"),
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


class Export(Protocol):
    """The fixture ``exported``."""

    def __call__(self, name: str, target: TargetName | None = None) -> Exported:
        """The export of a model that `build` makes; its target None is the usual one."""


def edit_manifest(directory: Path, **changes: object) -> None:
    """Change a manifest, and its checksum with it, as who attacks would."""
    path = directory / "flora_fx.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    content.pop("sha256", None)
    path.write_text(json.dumps({**content, "sha256": _digest(content)}), encoding="utf-8")
