"""The suites, in the order in which help and the page name them."""

from __future__ import annotations

import itertools
from pathlib import Path

from .accuracy.commands import ACCURACY
from .adapters.commands import ADAPTERS
from .asking.command import Command
from .generation.commands import CAPACITY, GENERATION
from .kernels.commands import KERNELS
from .latency.commands import DECODER, LATENCY, LAYOUTS
from .quantized.commands import QUANTIZED
from .scaling.commands import EXPORT, FORMS, LARGE, SCALING
from .show.page import Chapter
from .training.commands import TRAINING

__all__ = ["SUITES", "chapters"]

SUITES: dict[str, Command] = {
    suite.name: suite
    for suite in (
        LATENCY,
        LAYOUTS,
        DECODER,
        GENERATION,
        CAPACITY,
        TRAINING,
        SCALING,
        ADAPTERS,
        FORMS,
        LARGE,
        EXPORT,
        QUANTIZED,
        KERNELS,
        ACCURACY,
    )
}
"""By name."""


def chapters(record: Path) -> dict[str, Chapter]:
    """What the page is made of: ``SUITE.json``, then ``SUITE-anything.json``, then what a GPU host left.

    Args:
        record: folder of the JSON files.
    """
    found = {}
    for gpu_host, suite in itertools.product(("", "gpu-"), SUITES.values()):
        first = f"{gpu_host}{suite.name}"
        for name in (first, *sorted(file.stem for file in record.glob(f"{first}-*.json"))):
            detail = name.removeprefix(first).replace("-", " ")
            heading = f"{'GPU: ' if gpu_host else ''}{suite.title}{f':{detail}' if detail else ''}"
            found[name] = Chapter(heading, suite.text, suite.sheets, suite.draw, suite.setup)
    return found
