"""LoRA on every linear layer of a model, as its users put it there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Case", "adapters_of", "config", "lora", "perturbed", "values"]

RANKS = (4, 2, 6)
"""Of the layers of a block, one after the other by name: siblings differ."""
SCALE = 1.5


class Case(NamedTuple):
    """A model with its adapters in float64, in eval mode, and what it is called with."""

    model: Any
    inputs: dict[str, Any]


def lora(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Case:
    """With PEFT's LoRA on all linear layers but the head.

    Args:
        model: in any mode, with any weights.
        inputs: as it is called.
        options: of `peft.LoraConfig`.
    """
    settings = config(perturbed(model), **options)
    adapted = peft.get_peft_model(model, settings)
    return Case(adapted.double().eval().requires_grad_(False), inputs)


def config(model: nn.Module, **options: Any) -> peft.LoraConfig:
    """Ranks that differ between the layers of a block, one scale, B not zero."""
    kinds = (nn.Linear, Conv1D)
    names = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, kinds)})
    ranks = {name: RANKS[i % len(RANKS)] for i, name in enumerate(names)}
    return peft.LoraConfig(
        **{
            "r": RANKS[0],
            "lora_alpha": SCALE * RANKS[0],
            "rank_pattern": ranks,
            "alpha_pattern": {name: SCALE * rank for name, rank in ranks.items()},
            "target_modules": "all-linear",
            "init_lora_weights": False,
            **options,
        }
    )


def perturbed(model: nn.Module) -> nn.Module:
    """No bias is zero, no norm's weight is one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def adapters_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Every adapter's B, by its name."""
    return {name: weight for name, weight in model.named_parameters() if "lora_B" in name}


def values(*shape: int) -> Tensor:
    """Something to see or to hear."""
    return torch.randn(*shape, dtype=torch.float64)
