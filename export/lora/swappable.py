"""Weights of an exported LoRA that another one may replace: initializers that are inputs of the graph as well.

ONNX Runtime neither folds nor pre-packs an initializer that may be overridden. A caller that does not override it
(such as onnxruntime-genai) gets the adapter that was exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from flora_fx.errors import ExportError

from .layers import active_adapters, tuner_layers
from .reading import check_settings

__all__ = ["SwappablePart", "SwappableWeight", "check_swappable"]


@dataclass(frozen=True)
class SwappablePart:
    """Where one matrix of a LoRA stands in a weight [out, in].

    Attributes:
        module: the layer that it adapts, as the transformers model names it.
        which: ``"A"`` [rank, in] or ``"B"`` [out, rank]; B with its scale.
        rows, columns: ranges.
    """

    module: str
    which: str
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True)
class SwappableWeight:
    """An overridable initializer.

    Attributes:
        name: of the initializer, and of the input.
        transposed: stored as [in, out].
        parts: the matrices that may be replaced; all else in it stays.
    """

    name: str
    transposed: bool
    parts: tuple[SwappablePart, ...]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SwappableWeight:
        """From the JSON of `dataclasses.asdict`."""
        parts = (
            SwappablePart(part["module"], part["which"], tuple(part["rows"]), tuple(part["columns"]))
            for part in content["parts"]
        )
        return cls(content["name"], content["transposed"], tuple(parts))


def check_swappable(model: nn.Module) -> str:
    """The name of a model's LoRA.

    Args:
        model: a transformers model with PEFT's layers in it.

    Raises:
        ExportError: it has no active adapter, or several.
        AdapterError: it has another adapter than a LoRA of linear layers.
    """
    active = sorted(active_adapters(tuner_layers(model).values()))
    if len(active) != 1:
        has = f"it has {', '.join(active)}" if active else "it has none"
        raise ExportError(f"hot_swap needs a model with one active LoRA of PEFT; {has}")
    (adapter,) = active
    configs: Any = model.peft_config
    check_settings(configs[adapter].to_dict(), f"the model's adapter {adapter!r}")
    return adapter
