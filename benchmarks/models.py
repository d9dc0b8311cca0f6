"""Model shapes by name, with random weights and a PEFT LoRA on all seven projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SHAPES", "adapted_llama", "step_inputs"]

SHAPES: dict[str, dict[str, int]] = {
    "smollm-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}


class Step(nn.Module):
    """One forward over new tokens and past keys and values, all plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *past: Tensor) -> Tensor:
        """ids [batch, new]; past: key and value per layer, [batch, heads, past, head_dim]; returns last logits."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits
        return logits


def adapted_llama(shape: str, layers: int, *, rank: int | None) -> Step:
    """A random Llama of a named shape in eval mode, with an unmerged LoRA unless rank is None."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], num_hidden_layers=layers, tie_word_embeddings=True))
    if rank is not None:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, config).base_model.model
    return Step(model.eval().requires_grad_(False)).eval()


def step_inputs(shape: str, layers: int, new: int, past: int) -> tuple[Tensor, ...]:
    """Token ids [1, new] and random past keys and values."""
    sizes = SHAPES[shape]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    caches = [torch.randn(1, sizes["num_key_value_heads"], past, head) for _ in range(2 * layers if past else 0)]
    return (torch.randint(0, sizes["vocab_size"], (1, new)), *caches)
