"""Adapters as they are told to a command: by a path, or by a name and a path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flora_fx.errors import FloraError

__all__ = ["named_adapters"]


def named_adapters(given: Sequence[str], *, several: bool) -> str | dict[str, str] | None:
    """One path, several by name, or none.

    Args:
        given: paths or Hub ids, or ``NAME=…`` of them.
        several: whether they are wanted by name, though there be one.

    Raises:
        FloraError: a name twice, or none for what needs one.

    >>> named_adapters(["loras/1"], several=False)
    'loras/1'
    >>> named_adapters(["sql=loras/1", "loras/chat"], several=False)
    {'sql': 'loras/1', 'chat': 'loras/chat'}
    """
    parts = [_split(text) for text in given]
    if not parts:
        return None
    if len(parts) == 1 and not parts[0][0] and not several:
        return parts[0][1]
    found: dict[str, str] = {}
    for told, path in parts:
        name = told or Path(path).name
        if name in found:
            raise FloraError(f"two adapters are called {name!r}; pass --adapter NAME={path}")
        if not name or "." in name:
            raise FloraError(f"an adapter cannot be called {name!r}; pass --adapter NAME={path}, a name without a dot")
        found[name] = path
    return found


def _split(text: str) -> tuple[str, str]:
    """Name and path; the name is empty where there is none."""
    name, equals, path = text.partition("=")
    if not equals or not path or "/" in name or Path(text).exists():
        return "", text
    return name, path
