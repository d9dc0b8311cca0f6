"""Small models whose rotary positions change after 32 tokens, and their tokens without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

VOCAB, SWITCH, POSITIONS = 97, 32, 128
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def rope(switch: int = SWITCH, positions: int = POSITIONS, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": switch,
        "factor": positions / switch,
        "attention_factor": 1.2,
        "short_factor": [1 + 0.05 * i for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        **more,
    }


_CONFIGS: dict[str, Callable[..., Any]] = {
    "Phi-3": lambda switch, positions: transformers.Phi3Config(
        **{**_SHAPE, "max_position_embeddings": positions},
        original_max_position_embeddings=switch,
        rope_parameters=rope(switch, positions),
    ),
    # Its factors stay; the scale of its angles changes.
    "PhiMoE": lambda switch, positions: transformers.PhimoeConfig(
        **{**_SHAPE, "max_position_embeddings": positions},
        original_max_position_embeddings=switch,
        num_local_experts=2,
        rope_parameters=rope(switch, positions, short_mscale=1.0, long_mscale=1.7),
    ),
    # transformers' `generate` goes on with keys of the short factors.
    "Llama": lambda switch, positions: transformers.LlamaConfig(
        **{**_SHAPE, "max_position_embeddings": positions}, rope_parameters=rope(switch, positions)
    ),
}


def plain_longrope(name: str = "Phi-3", switch: int = SWITCH, positions: int = POSITIONS) -> Any:
    """A random model, in eval mode, in which positions matter."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(_CONFIGS[name](switch, positions))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
        # What pads is never the likeliest: onnxruntime-genai ends a text there where nothing else ends it.
        model.get_output_embeddings().weight[0] = 0
    return model.eval()


def build_longrope(switch: int = SWITCH) -> Any:
    """A Phi-3 with LoRA on every linear layer, and another one that is not active; always the same weights."""

    def lora(rank: int) -> peft.LoraConfig:
        return peft.LoraConfig(r=rank, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)

    model = plain_longrope("Phi-3", switch, POSITIONS // SWITCH * switch)
    model = peft.get_peft_model(model, lora(4))
    model.add_adapter("other", lora(3))
    return model.eval()


@torch.no_grad()
def uncached(model: nn.Module, ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Greedy tokens [batch, prompt + count], the whole text run for each."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(count):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


def prompts(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The first as long as said, the next ones shorter by 5 each; padded on the left."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, : min(5 * row, length - 1)] = 0
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator) * mask, mask
