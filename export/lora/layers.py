"""The layers that PEFT has put into a model, and the adapters that are active in them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["active_adapters", "tuner_layers"]


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers, by their names in the model."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")  # whoever made a PEFT model has imported it
    if tuners is None:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)}


def active_adapters(layers: Iterable[Any]) -> list[str]:
    """The adapters that are active in any of PEFT's layers, each once, in the order in which they are met."""
    return list(dict.fromkeys(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters))
