"""``int(length / 2)`` in a model, traced.

torch.export (2.13) takes the value that it has for constant, and a graph made so is right for one length.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["symbolic_int"]


class _IntMeta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, builtins.int)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, builtins.int)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.SymFloat):
            return torch.sym_int(args[0])
        return builtins.int(*args, **kwargs)


class _Int(metaclass=_IntMeta):
    """``int``, of traced numbers as well."""


@contextmanager
def symbolic_int(model: nn.Module) -> Iterator[None]:
    """For the time of a trace, what a transformers model's modules call ``int`` keeps traced numbers traced."""
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    changed = [
        vars(module)
        for module in modules
        if module.__name__.startswith("transformers.models.") and "int" not in vars(module)
    ]
    for names in changed:
        names["int"] = _Int
    try:
        yield
    finally:
        for names in changed:
            del names["int"]
