"""The parameters of an adapter as an optimizer takes them: B may learn faster than A."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from flora_fx.errors import AdapterError

__all__ = ["parameter_groups"]

_UP = re.compile(r"\.(flora_B|lora_B|lora_embedding_B)\.")


def parameter_groups(model: nn.Module, *, lr: float, ratio: float = 1.0) -> list[dict[str, Any]]:
    """What trains, for an optimizer: every B at a learning rate of its own (LoRA+, arXiv 2402.12354).

    Args:
        model: one with FFBA adapters or LoRAs; or without, for one group.
        lr: of every A, and of whatever else trains, such as ``modules_to_save``.
        ratio: the learning rate of B over that.

    Returns:
        ``[{"params": […], "lr": lr}, {"params": […], "lr": ratio * lr}]``; a group without parameters is left out.

    Raises:
        AdapterError: nothing trains.
        ValueError: lr or ratio is not a positive number.

    >>> import peft, torch, transformers as hf
    >>> from flora_fx.adapters import FloraConfig
    >>> shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    >>> model = peft.get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**shape)), FloraConfig(placement="shared"))
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, ratio=16))
    >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    [(0.001, 4), (0.016, 14)]
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be a positive number")
    up: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (up if _UP.search(name) else rest).append(parameter)
    if not up and not rest:
        raise AdapterError(f"no parameter of {type(model).__name__} requires gradients; activate an adapter first")
    groups = [{"params": rest, "lr": lr}, {"params": up, "lr": ratio * lr}]
    return [group for group in groups if group["params"]]
