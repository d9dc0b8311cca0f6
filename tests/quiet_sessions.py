"""Whether sessions that are timed in turns leave the cores to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flora_fx.export import load
from flora_fx.measuring.sessions import QUIET

__all__ = ["noted"]


def noted(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[bool]:
    """Of each export that a module's ``load`` opens from now on, whether its threads stop waiting after a run."""
    found: list[bool] = []

    def opened(directory: Path, *, session_options: Any) -> Any:
        found.append(session_options.get_session_config_entry(QUIET[0]) == QUIET[1])
        return load(directory, session_options=session_options)

    monkeypatch.setattr(module, "load", opened)
    return found
