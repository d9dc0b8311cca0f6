"""`python -m benchmarks quantized`: size, error, accuracy and tokens per second of a base in few bits."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flora_fx.measuring.method import pinned
from flora_fx.progress import Bar

from ..accuracy.model import Pretraining
from ..accuracy.recipe import Recipe
from ..contenders.settings import Settings
from .decoding import decode, sizes
from .task import TASK
from .task import measure as of_task

__all__ = ["LARGE", "measure"]

LARGE = "llama-3.2-1b"


def measure(
    settings: Settings,
    *,
    pretraining: Pretraining,
    recipe: Recipe,
    large: str = LARGE,
    prompt: int = 128,
    rounds: int = 80,
    progress: Bar,
) -> dict[str, Any]:
    """Train, export and time.

    Args:
        settings: of what is timed.
        pretraining: of the small model.
        recipe: of its adapter.
        large: the shape whose size in the file is told.
        prompt: tokens in front of those that are timed.
        rounds: tokens that are timed.
        progress: makes a bar for each part.

    Returns:
        ``{"settings", "quantized": {"task", "decode", "sizes", …}}``.
    """
    with pinned(settings.threads):
        place = Path(tempfile.gettempdir())
        task = of_task(pretraining, recipe, place, progress("learn and export"))
        tokens = decode(settings, prompt=prompt, rounds=rounds, progress=progress("tokens"))
        found = sizes(replace(settings, shape=large, layers=1), progress("sizes"))
    return {
        "settings": asdict(settings) | {"layers": settings.depth},
        "quantized": {
            "task": task,
            "decode": tokens,
            "sizes": found,
            "shape": large,
            "hidden": pretraining.hidden,
            "layers": pretraining.layers,
            "task_name": TASK,
            "prompt": prompt,
        },
    }
