"""The models that are compared: random weights, equal in all of them, in memory of their own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .ffba import Placement, adapter, largest_rank
from .settings import SHAPES, Settings

__all__ = [
    "PLACEMENTS",
    "Adapted",
    "Weights",
    "adapters_of",
    "ffba_of",
    "make_model",
    "outline",
    "targets_of",
    "weights_of",
]

Adapted = Literal["base", "peft", "merged", "ffba-block", "ffba-shared"]

PLACEMENTS: dict[Adapted, Placement] = {"ffba-block": "block", "ffba-shared": "shared"}
"""Those that have an FFBA adapter instead of a LoRA."""


def make_model(settings: Settings, adapted: Adapted, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model in eval mode, with random weights that depend on the settings alone.

    Args:
        settings: shape, depth, adapter, device.
        adapted: ``base`` has no adapter, ``peft`` an unmerged LoRA whose B is not zero, ``merged`` has it merged,
            ``ffba-block`` and ``ffba-shared`` have an FFBA adapter of no more parameters than the LoRA instead.
        dtype: other than the settings', for a reference; weights are first rounded to the settings' dtype.

    Returns:
        a transformers model, or a PEFT model around one; nothing requires gradients.

    Raises:
        AdapterError: the LoRA has fewer parameters than an FFBA adapter of rank 1.
    """
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = _build(settings, adapted)
    model = _cast(model, settings.torch_dtype).eval().requires_grad_(False)
    if adapted == "merged":
        model = model.merge_and_unload()
    if settings.device == "cuda":
        torch.cuda.empty_cache()  # what the weights took in float32, for the processes beside this one
    return _cast(model, dtype or settings.torch_dtype)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """With weights in a dtype, and buffers as they are, as a checkpoint is loaded.

    The frequencies of rotary embeddings are buffers. Rounded to half precision they turn position 1,000 by 0.2 radians,
    and a graph whose exporter computed them itself would be another model's.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def outline(settings: Settings, adapted: Adapted) -> nn.Module:
    """The same on the meta device: shapes and dtypes, no memory."""
    with torch.device("meta"):
        model: nn.Module = _cast(_build(settings, adapted), settings.torch_dtype)
    return model.eval().requires_grad_(False)


def _build(settings: Settings, adapted: Adapted) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**SHAPES[settings.shape], "num_hidden_layers": settings.depth, "tie_word_embeddings": True}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
    if adapted == "base":
        return model
    import peft

    return peft.get_peft_model(model, _adapter(settings, adapted))


def _adapter(settings: Settings, adapted: Adapted) -> Any:
    if placement := PLACEMENTS.get(adapted):
        return adapter(placement, _rank(settings, placement))
    import peft

    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=targets_of(settings),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


_OWN_NAMES = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
"""The projections of models that have others than `PROJECTIONS`: a LoRA is on all of them."""


def targets_of(settings: Settings) -> list[str]:
    """The projections that carry a LoRA, as the model names them.

    >>> targets_of(Settings("gpt2"))
    ['c_attn', 'c_proj', 'c_fc']
    """
    return _OWN_NAMES.get(str(SHAPES[settings.shape]["model_type"]), list(settings.targets))


@functools.cache
def _rank(settings: Settings, placement: Placement) -> int:
    with torch.device("meta"):  # where nothing is drawn: the first call leaves the generator as later ones do
        return largest_rank(placement, outline(settings, "base"), weights_of(settings, "peft").adapter)


def ffba_of(settings: Settings, adapted: Adapted) -> dict[str, Any]:
    """What a row of results says of an FFBA adapter: ``{"ffba": {"placement", "rank"}}``; nothing of other models."""
    placement = PLACEMENTS.get(adapted)
    return {"ffba": {"placement": placement, "rank": _rank(settings, placement)}} if placement else {}


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All A and B of a model's unmerged adapters, LoRA or FFBA, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(part.startswith(("lora_", "flora_")) for part in name.split("."))
    }


@dataclass(frozen=True)
class Weights:
    """What a forward has to read, in elements.

    Attributes:
        layers: base projections and norms of the decoder layers.
        head: the output projection, which is the embedding too.
        adapter: all A and B of an unmerged adapter.
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

    def bytes(self, dtype: torch.dtype) -> int:
        """What one decode step streams from memory."""
        return (self.layers + self.head + self.adapter) * dtype.itemsize


@functools.cache
def weights_of(settings: Settings, adapted: Adapted) -> Weights:
    """Count without allocating; a merged adapter adds no weights to the base's."""
    model = outline(settings, "base" if adapted == "merged" else adapted)
    named = {name: parameter.numel() for name, parameter in model.named_parameters()}
    adapters = sum(named[name] for name in adapters_of(model))
    head = sum(count for name, count in named.items() if name.endswith(("embed_tokens.weight", ".wte.weight")))
    return Weights(sum(named.values()) - adapters - head, head, adapters)
