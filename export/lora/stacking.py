"""Several LoRAs of one model as one: the A's of a layer below each other, its B's beside each other.

    A = [A₀; A₁; …]   B = [s₀·B₀, s₁·B₁, …]

Where another LoRA may take the place of one, each slot has as many rows of A and columns of B; those that a rank leaves
are zero. Which slot a row of a batch takes is written into the graph, see `export.translate.slots`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.checkpoint.numbers import check_finite
from flora_fx.errors import AdapterError, ExportError

from ..trace.model import private_copy
from .layers import active_adapters, tuner_layers
from .reading import Lora, LoraLayer, check_settings
from .slots import EMPTY, Slot, checked_name, rank_of

__all__ = ["STACK", "SlotPlan", "named_lora", "plan_slots", "stack"]

STACK = "slots"
"""What the one LoRA is called."""


@dataclass(frozen=True)
class SlotPlan:
    """The slots of an export.

    Attributes:
        names: of the adapters of the model that stand in the first ones.
        slots: all of them.
        widths: of each slot, in each layer that has any, by the layer's name: rows of A, columns of B.
        replaceable: whether another LoRA may take the place of one; then a slot is as wide everywhere.
    """

    names: tuple[str, ...]
    slots: tuple[Slot, ...]
    widths: Mapping[str, tuple[int, ...]]
    replaceable: bool


def plan_slots(
    model: nn.Module,
    names: Sequence[str] | None = None,
    count: int | None = None,
    rank: int | None = None,
    *,
    replaceable: bool = False,
) -> SlotPlan:
    """What an export of several LoRAs holds.

    Args:
        model: a transformers model with PEFT's layers in it.
        names: of its adapters; None for the active ones.
        count: slots; None for as many as there are names.
        rank: of every slot; None for the highest of the adapters.
        replaceable: whether others may take their place; so it is where there is ``count`` or ``rank``.

    Raises:
        AdapterError: an unknown adapter, one that is no LoRA of linear layers, too few slots, or too low a rank.
        ExportError: the model has no adapter.
        TypeError, ValueError: arguments that cannot be.
    """
    known: Mapping[str, Any] = getattr(model, "peft_config", {})
    if not known:
        raise ExportError("adapters, slots and rank are for a PEFT model, whose LoRAs say which layers have slots")
    if isinstance(names, str):
        raise TypeError(f"adapters is {names!r}; it must be a list of names")
    if names is None:
        names = active_adapters(layer for layer in tuner_layers(model).values() if hasattr(layer, "lora_A"))
    names = tuple(names)
    for name in names:
        if name not in known:
            raise AdapterError(f"the model has no adapter {name!r}; it has {', '.join(map(repr, known))}")
        checked_name(name, ())
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"adapters is {list(names)}; it must name at least one adapter, and each once")
    for name, config in known.items():  # what they add besides would be in the export for every row
        check_settings(config.to_dict() if name in names else _besides(config.to_dict()), f"the adapter {name!r}")
    loras = [named_lora(model, name) for name in names]
    for what, value in (("slots", count), ("rank", rank)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{what} is {value!r}; it must be a whole number of at least 1")
    if count is not None and count < len(names):
        raise AdapterError(f"slots is {count}, and there are {len(names)} adapters; pass slots={len(names)} or more")
    highest = max(map(rank_of, loras))
    if rank is not None and rank < highest:
        name = next(lora.name for lora in loras if rank_of(lora) == highest)
        raise AdapterError(f"rank is {rank}, and {name} has rank {highest}; pass rank={highest} or more")
    filled = tuple(Slot.of(name, lora) for name, lora in zip(names, loras, strict=True))
    slots = filled + (EMPTY,) * ((count or len(names)) - len(names))
    replaceable = replaceable or count is not None or rank is not None
    widths = {}
    for path in dict.fromkeys(path for lora in loras for path in lora.layers):
        own = (lora.layers.get(path) for lora in loras)
        exact = tuple(0 if layer is None else layer.down.shape[0] for layer in own)
        widths[path] = (rank or highest,) * len(slots) if replaceable else exact
    return SlotPlan(names, slots, widths, replaceable)


def named_lora(model: nn.Module, name: str) -> Lora:
    """The matrices of one of a model's adapters, its own memory.

    Args:
        model: a transformers model with PEFT's layers in it.
        name: of the adapter.

    Raises:
        AdapterError: it is no LoRA of linear layers, is merged, or holds NaN or infinity.
    """
    layers = {}
    for path, module in model.named_modules():
        layer: Any = module
        if name in getattr(layer, "lora_embedding_A", ()):
            raise AdapterError(f"the adapter {name!r} adapts the embedding {path}; only linear layers have slots")
        if name not in getattr(layer, "lora_A", ()):
            continue
        down, up = layer.lora_A[name], layer.lora_B[name]
        if not isinstance(down, nn.Linear) or not isinstance(up, nn.Linear):
            raise AdapterError(f"the adapter {name!r} adapts {path}, which is no linear layer; only those have slots")
        if layer.merged:
            raise AdapterError(f"{path} has an adapter merged into it; call model.unmerge_adapter() first")
        for which, weight in (("A", down.weight), ("B", up.weight)):
            check_finite(weight, f"the adapter {name!r}: {which} of {path}")
        layers[path] = LoraLayer(down.weight.detach(), up.weight.detach(), float(layer.scaling[name]))
    if not layers:
        raise AdapterError(f"the adapter {name!r} adapts no layer of the model")
    return Lora(f"the adapter {name!r}", layers)


def stack(model: nn.Module, plan: SlotPlan) -> nn.Module:
    """A private copy of a model with its LoRAs as one, called `STACK`; all of it acts on every row.

    Args:
        model: a transformers model with PEFT's layers in it; it is left as it was.
        plan: of it, see `plan_slots`.

    Raises:
        AdapterError: see `named_lora`; or a B is too large for its dtype, times its scale.
    """
    private = private_copy(model)
    loras = [named_lora(private, name) for name in plan.names]
    for path, layer in tuner_layers(private).items():
        base = layer.get_base_layer()
        parts = [lora.layers.get(path) for lora in loras]
        private.set_submodule(path, _stacked(path, base, parts, plan) if path in plan.widths else base)
    return private


class StackedLora(nn.Module):
    """A layer with one LoRA of scale 1.

    Args:
        base: the layer; x [batch, seq, in] -> y [batch, seq, out].
        down: A [rank, in].
        up: B [out, rank].
    """

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({STACK: _linear(down)})  # PEFT's names, which are looked for
        self.lora_B = nn.ModuleDict({STACK: _linear(up)})

    @property
    def weight(self) -> Any:
        """Of the base: some models ask their layers for it."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """As PEFT's: in the dtype of the LoRA, if that is another one."""
        y: Tensor = self.base_layer(x)
        down, up = self.lora_A[STACK], self.lora_B[STACK]
        return (y + up(down(x.to(down.weight.dtype)))).to(y.dtype)  # type: ignore[arg-type]


def _linear(weight: Tensor) -> nn.Linear:
    out, inside = weight.shape
    layer = nn.Linear(inside, out, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _stacked(path: str, base: nn.Module, parts: Sequence[LoraLayer | None], plan: SlotPlan) -> StackedLora:
    starts = list(itertools.accumulate(plan.widths[path], initial=0))
    first, *others = [part for part in parts if part is not None]
    dtype = functools.reduce(torch.promote_types, (part.down.dtype for part in others), first.down.dtype)
    down = first.down.new_zeros(starts[-1], first.down.shape[1], dtype=dtype)
    up = first.up.new_zeros(first.up.shape[0], starts[-1], dtype=dtype)
    for slot, part in enumerate(parts):
        if part is None:
            continue
        start, stop = starts[slot], starts[slot] + part.down.shape[0]
        down[start:stop] = part.down
        torch.mul(part.up, part.scale, out=up[:, start:stop])
        if not up[:, start:stop].isfinite().all():
            raise AdapterError(
                f"the adapter {plan.names[slot]!r}: B of {path}, times its scale {part.scale:g}, is too large for "
                f"{dtype}; export the model in another dtype"
            )
    return StackedLora(base, down, up)


def _besides(settings: dict[str, Any]) -> dict[str, Any]:
    """Of an adapter that is left out: what it changes besides its own layers."""
    kept = ("peft_type", "bias", "modules_to_save", "trainable_token_indices", "target_parameters")
    return {key: settings[key] for key in kept if key in settings}
