"""In a checkout, ``passes/`` and ``export/`` stand beside this folder, not in it (see pyproject.toml).

A longer ``__path__`` would find them, too, but whoever walks the package (``TORCH_LOGS`` does) would find flora_fx in
flora_fx, without an end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

__all__ = ["checkout", "find_folders_beside"]

_HERE = Path(__file__).parent
_BESIDE = {f"{__package__}.{folder}" for folder in ("passes", "export")}


class _Beside(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [str(_HERE.parent)]) if fullname in _BESIDE else None


def checkout() -> Path | None:
    """The folder that git knows, with ``benchmarks/`` in it; None where the package is installed."""
    return None if (_HERE / "passes").is_dir() else _HERE.parent


def find_folders_beside() -> None:
    """Let ``flora_fx.passes`` and its like be imported where the package is not installed."""
    if checkout():
        sys.meta_path.insert(0, _Beside())
