"""Results of record: JSON with everything that a reader needs to judge a figure or to repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flora_fx.measuring.environment import environment

__all__ = ["RECORD", "read", "save"]

RECORD = Path(__file__).parent.parent / "results"
"""Where the JSON of record lies."""


def save(name: str, result: dict[str, Any], folder: Path, command: str) -> Path:
    """Write ``NAME.json``; it appears when it is whole.

    Args:
        name: of the suite.
        result: what it measured.
        folder: made if missing.
        command: what was typed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"environment": environment(command), **result}, indent=1) + "\n")
    unfinished.replace(path)
    return path


def read(name: str, folder: Path) -> dict[str, Any]:
    """What `save` wrote.

    Args:
        name: of the record.
        folder: that it lies in.

    Raises:
        ValueError: there is no such record.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"there is no record {path}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
