"""What a GPU host is asked in a quarter of an hour: ``python -m benchmarks gpu prepare``, then ``... gpu measure``.

``prepare`` does what the CPU bounds, side by side: exports, compilations into a cache, references, counts, GPU tests.
``measure`` takes times alone, one section after the other, in order of worth. Each section is a process with a limit of
its own; what it found is on disk as soon as it is found, and one that fails leaves its last lines.

Both read what is in a folder: a second ``prepare`` does what the first one did not. ``--rehearse`` runs the same code
tiny and on a CPU.
"""

from __future__ import annotations

from . import measuring, preparing
from .phase import Phase

__all__ = ["PHASES"]

PHASES: dict[str, Phase] = {phase.name: phase for phase in (preparing.PHASE, measuring.PHASE)}
"""By name, in order."""
