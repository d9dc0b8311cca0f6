"""The models that are compared: random weights, equal in all of them, in memory of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .settings import SHAPES, Settings

__all__ = ["Adapted", "Weights", "make_model", "weights_of"]

Adapted = Literal["base", "peft", "merged"]


def make_model(settings: Settings, adapted: Adapted, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model in eval mode, with random weights that depend on the settings alone.

    Args:
        settings: shape, depth, adapter, device.
        adapted: ``base`` has no adapter, ``peft`` an unmerged LoRA whose B is not zero, ``merged`` has it merged.
        dtype: other than the settings', for a reference; weights are first rounded to the settings' dtype.

    Returns:
        a transformers model, or a PEFT model around one; nothing requires gradients.
    """
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = _build(settings, adapted)
    model = model.to(settings.torch_dtype).eval().requires_grad_(False)
    if adapted == "merged":
        model = model.merge_and_unload()
    return model.to(dtype)


def _build(settings: Settings, adapted: Adapted) -> Any:
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**SHAPES[settings.shape], "num_hidden_layers": settings.depth, "tie_word_embeddings": True}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
    if adapted == "base":
        return model
    lora = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=list(settings.targets),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora)


@dataclass(frozen=True)
class Weights:
    """What a forward has to read, in elements.

    Attributes:
        layers: base projections and norms of the decoder layers.
        head: the output projection, which is the embedding too.
        adapter: all A and B.
    """

    layers: int
    head: int
    adapter: int

    def floor(self, tokens: int) -> float:
        """The least that unmerged adapters can cost, relative to the base: 1 + adapter / base.

        One token reads every weight once, so this is bytes over bytes. A prompt is bound by arithmetic: every weight
        of a layer is used for each token, the head for the last token only.
        """
        return 1 + tokens * self.adapter / (tokens * self.layers + self.head)

    def bytes(self, dtype: torch.dtype, *, adapted: bool) -> int:
        """What one decode step streams from memory."""
        return (self.layers + self.head + (self.adapter if adapted else 0)) * dtype.itemsize


def weights_of(settings: Settings) -> Weights:
    """Count without allocating."""
    with torch.device("meta"):
        model = _build(settings, "peft")
    named = [(name, parameter.numel()) for name, parameter in model.named_parameters()]
    adapter = sum(count for name, count in named if "lora_" in name)
    head = sum(count for name, count in named if "embed_tokens" in name)
    return Weights(sum(count for _, count in named) - adapter - head, head, adapter)
