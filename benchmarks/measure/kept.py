"""What costs more to compute than to read: computed once, for all processes that share a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["once"]


def once(folder: Path | None, key: object, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was computed before for a key, or is now.

    Args:
        folder: of the files, one per key; made if missing. None to compute it and keep nothing.
        key: its `repr` says all that the result depends on, but for torch's version.
        compute: gives tensors, numbers and containers of them.
    """
    if folder is None:
        return compute()
    file = folder / f"{hashlib.sha256(repr((torch.__version__, key)).encode()).hexdigest()[:24]}.pt"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")  # another process may be at it, too
        torch.save(compute(), unfinished)
        unfinished.replace(file)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found
