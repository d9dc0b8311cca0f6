"""More adapters on a model that has one already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_fx.errors import AdapterError

from .adapter_files import adapter_file, read_adapter
from .attach import attach_further, whole_weights
from .numbers import check_numbers
from .places import resolve
from .wording import examples

__all__ = ["add_adapter", "named"]


def named(
    adapter: str | Path | Mapping[str, str | Path] | None,
) -> tuple[str, str | Path | None, dict[str, str | Path]]:
    """The first of some adapters, its name, and the others by theirs.

    Raises:
        ValueError: there is none in a mapping, or a name that PEFT does not take.

    >>> named("path/to/lora")
    ('default', 'path/to/lora', {})
    >>> named({"sql": "loras/1", "chat": "loras/2"})
    ('sql', 'loras/1', {'chat': 'loras/2'})
    """
    if not isinstance(adapter, Mapping):
        return "default", adapter, {}
    if not adapter:
        raise ValueError("adapter names no adapter; pass None for the base alone")
    for name in adapter:
        if not name or "." in name:
            raise ValueError(f"an adapter cannot be called {name!r}; give it a name without a dot")
    (name, first), *others = adapter.items()
    return name, first, dict(others)


def add_adapter(model: Any, name: str, adapter: str | Path, *, verify: bool = True) -> None:
    """Read an adapter and put it beside those that a model has; it is not active.

    Args:
        model: of `load_model`, with an adapter; changed in place.
        name: of the new one.
        adapter: directory or Hub id.
        verify: see `load_model`.

    Raises:
        AdapterError, CheckpointNotFoundError: as `load_model`; or the adapter holds weights of the base, which the
            others would have, too.
    """
    directory = resolve(adapter)
    path = adapter_file(directory)
    modules = [found for found, _ in model.base_model.model.named_modules()]
    settings, tensors = read_adapter(directory, verify=verify, modules=modules)
    check_numbers(tensors, path)
    if whole := whole_weights(tensors):
        raise AdapterError(
            f"{path} holds weights of the base{examples(sorted(whole))}, which all adapters of a model would have; "
            "load it alone"
        )
    attach_further(model, settings, tensors, path, name)
