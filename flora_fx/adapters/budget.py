"""Trainable parameters of adapters, and the rank that a budget of them buys."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from flora_fx.errors import AdapterError

__all__ = ["parameters_of", "rank_for_budget"]


def parameters_of(config: PeftConfig, model: nn.Module) -> int:
    """How many parameters an adapter would train; nothing is attached.

    Args:
        config: a `FloraConfig`, a `peft.LoraConfig` or any other with a rank ``r``.
        model: the base model.

    Returns:
        the number of parameters that require gradients once it is attached.

    Raises:
        AdapterError: the model has adapters already, or does not fit the configuration.

    >>> import transformers as hf
    >>> from flora_fx.adapters import FloraConfig
    >>> shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    >>> model = hf.LlamaForCausalLM(hf.LlamaConfig(**shape))
    >>> parameters_of(FloraConfig(r=4), model)  # 2 layers, 2 blocks, A [4, 32] and B [32, 4]
    1024
    """
    if hasattr(model, "peft_config"):
        raise AdapterError(f"{type(model).__name__} has adapters already; count on the base model (unload())")
    config = copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA and its like compute with weights, and there are none
    adapted = get_peft_model(_without_memory(model), config)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def rank_for_budget(model: nn.Module, config: PeftConfig, *, parameters: int) -> int:
    """The largest rank whose adapter trains no more than a number of parameters.

    Args:
        model: the base model.
        config: as for `parameters_of`; its rank is not looked at.
        parameters: the budget.

    Raises:
        AdapterError: rank 1 costs more than the budget, the rank decides nothing, or as for `parameters_of`.

    >>> import transformers as hf
    >>> from flora_fx.adapters import FloraConfig
    >>> shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    >>> rank_for_budget(hf.LlamaForCausalLM(hf.LlamaConfig(**shape)), FloraConfig(), parameters=1100)
    4
    """
    one, two = (parameters_of(_with_rank(config, rank), model) for rank in (1, 2))
    if one == two:
        raise AdapterError("the rank of this adapter does not decide how many parameters it has (rank_pattern?)")
    # Whatever else trains (modules_to_save) costs the same at every rank.
    rank = (parameters - (2 * one - two)) // (two - one)
    if rank < 1:
        raise AdapterError(f"{parameters} parameters are too few: rank 1 of this adapter has {one}")
    return rank


def _with_rank(config: Any, rank: int) -> PeftConfig:
    found: PeftConfig = dataclasses.replace(config, r=rank)
    return found


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    tensors = {*model.parameters(), *model.buffers()}
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else torch.empty_like(tensor, device="meta")
        for tensor in tensors
    }
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied
