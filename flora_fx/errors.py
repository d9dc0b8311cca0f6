"""The errors flora_fx raises on purpose: each names the thing at fault and the remedy."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "AdapterError",
    "CaptureError",
    "CheckpointNotFoundError",
    "ExportError",
    "FloraError",
    "MissingExtraError",
    "TieError",
    "require",
]


class FloraError(Exception):
    """Base of every error that flora_fx raises on purpose."""


class AdapterError(FloraError, ValueError):
    """An adapter or a model does not fit: wrong shapes, NaN, missing keys, not a known format."""


class CaptureError(FloraError, RuntimeError):
    """A model could not be turned into a graph."""


class CheckpointNotFoundError(FloraError, FileNotFoundError):
    """A directory, or a file that a checkpoint cannot do without, is not there."""


class ExportError(FloraError, RuntimeError):
    """An export could not be written or did not pass its own check."""


class TieError(FloraError, RuntimeError):
    """A packed weight and the parameters it is made of can no longer be kept the same."""


class MissingExtraError(FloraError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency or say which extra brings it.

    Args:
        module: the module's import name.
        extra: the extra of flora-fx that installs it.

    Raises:
        MissingExtraError: the module cannot be found.

    >>> require("json", "cli").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module!r} is needed here and is not installed; install it with: pip install 'flora-fx[{extra}]'"
        ) from error
