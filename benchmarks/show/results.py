"""Results of record: JSON with everything that a reader needs to judge a figure or to repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flora_fx.measuring.environment import environment

__all__ = ["RECORD", "save"]

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
