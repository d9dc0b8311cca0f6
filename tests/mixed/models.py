"""PEFT models with adapters that differ in rank, targets, scale, bias: each row of a batch has one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flora_fx.adapters import FloraConfig
from tests.variants.models import WIDTH, Linears

ADAPTERS: dict[str, dict[str, Any]] = {
    "sql": {"r": 3, "lora_alpha": 4, "target_modules": ["q", "k", "v", "o"]},
    "chat": {"r": 5, "lora_alpha": 7, "target_modules": ["q", "o"], "use_rslora": True},
    "code": {"r": 1, "lora_alpha": 2, "target_modules": ["q", "k", "v", "head"], "lora_bias": True},
    "math": {"r": 2, "lora_alpha": 3, "target_modules": ["v"], "lora_dropout": 0.3},
}


def moved(model: Any) -> Any:
    """The model in float64, every adapter moved from where it began: B is not zero."""
    model.double()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "flora_" in name:
            parameter.requires_grad_(True)
            parameter.data = 0.4 * torch.randn_like(parameter)
    return model


def adapted(base: nn.Module | None = None, adapters: dict[str, dict[str, Any]] | None = None) -> Any:
    """A model with adapters, in eval mode, all of whose adapters require gradients."""
    (first, options), *others = (adapters or ADAPTERS).items()
    model: Any = peft.get_peft_model(base or Linears(), peft.LoraConfig(**options), adapter_name=first)
    for name, options in others:
        model.add_adapter(name, peft.LoraConfig(**options))
    return moved(model).eval()


def ffba(**options: Any) -> Any:
    """A Llama with two FFBA adapters, "one" and "two", in eval mode."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8
        )
    )
    model: Any = peft.get_peft_model(base, FloraConfig(r=3, alpha=5, **options), adapter_name="one")
    model.add_adapter("two", FloraConfig(r=2, alpha=7, **options))
    return moved(model).eval()


def batch(rows: int, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, 5, width, dtype=torch.float64)


def alone(model: Any, x: Tensor, names: Sequence[str | None]) -> Tensor:
    """Each row by a call of its own, with its adapter active and no other, which leaves ``requires_grad`` as it was."""
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    rows = []
    for row, name in zip(x, names, strict=True):
        if name is None:
            with model.disable_adapter():
                rows.append(model(row[None]))
        else:
            model.set_adapter(name)
            rows.append(model(row[None]))
    for parameter, own in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(own)
    return torch.cat(rows)


def assert_exact(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
