"""A batch whose rows have adapters of their own, in PyTorch.

base              nobody has an adapter
PEFT              PEFT's ``adapter_names``, which goes through the adapters of the batch
stacked           `flora_fx.capture` with ``adapters``, fused
backend           `flora_fx.MixedAdapters` under ``torch.compile(backend="flora")``
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx import MixedAdapters

from ..contenders.models import make_model, targets_of
from ..contenders.settings import Settings
from ..contenders.step import CachedStep
from ..contenders.torch_contenders import RUNNERS, Form, TorchContender, built, cache_of

__all__ = ["FORMS", "PEFT", "adapted", "rows_of", "torch_contenders"]

PEFT = "PEFT adapter_names (eager)"
"""What ratios are taken to."""

FORMS: dict[str, Form] = {
    "base (eager)": RUNNERS["eager"]["base"],
    PEFT: RUNNERS["eager"]["PEFT"],
    "stacked (eager)": RUNNERS["eager"]["fused"],
    "base (inductor)": RUNNERS["inductor"]["base"],
    "stacked (inductor)": RUNNERS["inductor"]["fused"],
    "backend (inductor)": RUNNERS["inductor"]["fused (flora backend)"],
    "base (CUDA graph)": RUNNERS["reduce-overhead"]["base"],
    "stacked (CUDA graph)": RUNNERS["reduce-overhead"]["fused"],
    "backend (CUDA graph)": RUNNERS["reduce-overhead"]["fused (flora backend)"],
}
"""What takes turns where the device has it. PEFT compiles its loop anew for each mix of adapters, so it stays eager."""


def adapted(settings: Settings, count: int) -> tuple[nn.Module, Any, list[str]]:
    """The base, a PEFT model around another one of the same weights, and the names of its adapters.

    Args:
        settings: of the model; its rank is every adapter's.
        count: of adapters, whose scales are alike, and whose weights are not.
    """
    import peft

    base = make_model(settings, "base")
    names = [f"adapter_{index}" for index in range(count)]
    model: Any = make_model(settings, "base")
    for name in names:
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            target_modules=targets_of(settings),
            init_lora_weights=False,
        )
        if name == names[0]:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return base, model.to(settings.torch_dtype).eval().requires_grad_(False), names


def rows_of(settings: Settings, names: Sequence[str]) -> list[str]:
    """The adapter of each row: they take turns."""
    return [names[index % len(names)] for index in range(settings.batch)]


def torch_contenders(
    settings: Settings,
    base: nn.Module,
    model: Any,
    names: Sequence[str],
    prompt: Tensor,
    room: int,
    wanted: Collection[str],
) -> Mapping[str, TorchContender]:
    """Forms of a batch in which the adapters take turns.

    Args:
        settings: its batch is the number of rows.
        base, model, names: as `adapted` gives them.
        prompt: [batch, tokens].
        room: tokens behind it.
        wanted: which of `FORMS`.
    """
    rows = rows_of(settings, names)
    found = {}
    for name, form in FORMS.items():
        if name not in wanted:
            continue
        own = copy.deepcopy(base if name.startswith("base") else model)  # what is fused moves its weights
        module = own if name.startswith("base") else _Named(own, rows) if name == PEFT else _Mixed(own, names, rows)
        step, cache = CachedStep(module).eval(), cache_of(form, settings, prompt.shape[1] + room)
        position = torch.zeros((), dtype=torch.int64, device=prompt.device)
        with torch.no_grad():
            decode = built(form, step, prompt[:, :1], position, *cache)
        # Prompts are not timed: they go through the live module, in the same cache.
        found[name] = TorchContender(step, decode, cache, compiled=form.way != "eager")
    return found


class _Named(nn.Module):
    """As PEFT is told which row has which."""

    def __init__(self, model: nn.Module, rows: Sequence[str]) -> None:
        super().__init__()
        self.model, self.rows = model, list(rows)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs, adapter_names=self.rows)


class _Mixed(nn.Module):
    """As we are."""

    ids: Tensor

    def __init__(self, model: nn.Module, names: Sequence[str], rows: Sequence[str]) -> None:
        super().__init__()
        self.model = MixedAdapters(model, names)
        device = next(model.parameters()).device
        self.register_buffer("ids", self.model.ids(rows, device), persistent=False)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs, adapter_ids=self.ids)
