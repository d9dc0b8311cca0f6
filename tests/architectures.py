"""Small models of many families with a LoRA on every linear layer: ranks differ between siblings, B is not zero."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers as hf

VOCAB = 97
_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_SEQ2SEQ = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

MODELS: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=4)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=16)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GROUPED, head_dim=16, sliding_window=4)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=128, **_IDS)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=48,
            word_embed_proj_dim=48,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            **_IDS,
        )
    ),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_SIZES)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_SEQ2SEQ)),
    "vit": lambda: hf.ViTModel(
        hf.ViTConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        )
    ),
}


def base_model(name: str) -> torch.nn.Module:
    """A model of one family with random weights, in eval mode."""
    model: torch.nn.Module = MODELS[name]().eval()
    return model


def lora_model(name: str, *, dropout: float = 0.1) -> Any:
    """The same with an unmerged PEFT LoRA: scale 7/4 (7/6 for values), rank 4 (6), dropout in eval mode."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        lora_dropout=dropout,
        target_modules="all-linear",
        init_lora_weights=False,
        rank_pattern={".*(v_proj|value)": 6},
    )
    return peft.get_peft_model(base_model(name), config).eval().requires_grad_(False)


def example_inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of batch 2."""
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
    ids = torch.randint(3, VOCAB, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (2, 5))
    return inputs
