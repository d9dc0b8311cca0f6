"""A small Llama whose base is held in few bits, with LoRA on all seven projections, and its exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from flora_fx.export.trace.model import private_copy, unwrap
from flora_fx.quantized import QuantizedLinear, QuantizedWeight
from tests.quantized.weights import affine, codebook

LAYERS, RANK = 1, 5

FORMATS: dict[str, Callable[[int, int, int], QuantizedWeight]] = {
    "4 bits": lambda n, k, seed: affine(n, k, block=32, zeros=False, dtype=torch.float32, seed=seed)[0],
    "4 bits, zero points": lambda n, k, seed: affine(n, k, block=32, seed=seed)[0],
    "4 bits, act-order": lambda n, k, seed: affine(n, k, order=_order(k), seed=seed)[0],
    "4 bits, blocks of 48": lambda n, k, seed: affine(n, k, block=48, seed=seed)[0],
    "8 bits, a row": lambda n, k, seed: affine(n, k, bits=8, block=k, zeros=False, seed=seed)[0],
    "2 bits": lambda n, k, seed: affine(n, k, bits=2, seed=seed)[0],
    "NF4": lambda n, k, seed: codebook(n, k, kind="nf4", block=32, seed=seed),
    "FP4": lambda n, k, seed: codebook(n, k, kind="fp4", block=16, seed=seed),
    "NF4 across rows": lambda n, k, seed: codebook(n, k, kind="nf4", block=128, seed=seed),
}
"""Weights [n, k] drawn at random, by what is told of them."""


def _order(k: int) -> torch.Tensor:
    """As act-order has it: the same for all that read one value."""
    return torch.randperm(k, generator=torch.Generator().manual_seed(k))


def build(name: str, layers: int = LAYERS, *, seed: int = 7, **sizes: Any) -> Any:
    """A model with quantized projections and a LoRA: ranks that divide nothing, B not zero, scale not 1.

    Args:
        name: a key of `FORMATS`.
        layers: how many.
        seed: of the adapter; the base is always the same.
        sizes: of the config.
    """
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, **sizes},
        vocab_size=97,
        num_hidden_layers=layers,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms that are equal would be one
                parameter.normal_(1, 0.1)
    linears = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    for number, (path, linear) in enumerate(linears):
        if path != "lm_head":
            n, k = linear.weight.shape
            model.set_submodule(path, QuantizedLinear(_of_unit(FORMATS[name](n, k, number))))
    torch.manual_seed(seed)
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=7,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        rank_pattern={"k_proj": 3, "up_proj": 2},
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, lora).eval()


def _of_unit(weight: QuantizedWeight) -> QuantizedWeight:
    """The same codes with scales for outputs about as large as inputs."""
    size = float(weight.dequantize(torch.float32).std()) * weight.shape[1] ** 0.5
    return replace(weight, scales=(weight.scales.float() * (2.0 / size)).to(weight.scales.dtype))


def greedy(model: Any, prompt: Tensor, count: int) -> Tensor:
    """What transformers generates greedily in float64, over the dequantized base with its adapter beside it."""
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
    wide = private_copy(unwrap(model), torch.float64)
    mask = torch.ones_like(prompt)
    tokens: Tensor = wide.generate(input_ids=prompt, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    return tokens
