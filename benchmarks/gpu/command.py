"""What is typed for the phases of a GPU host."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ..asking.options import Options
from . import PHASES

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of both phases.

    Args:
        parser: gets them.
    """
    parser.add_argument("phase", choices=PHASES, help="first prepare, then measure")
    parser.add_argument("--folder", type=Path, help="of both phases (flora-gpu, in the folder of temporary files)")
    parser.add_argument("--sections", nargs="+", default=(), metavar="NAME", help="only these")
    minutes = ", ".join(f"{phase.minutes:g} to {name}" for name, phase in PHASES.items())
    parser.add_argument("--minutes", type=float, help=f"in all ({minutes})")
    parser.add_argument("--rehearse", action="store_true", help="the same sections, tiny and on the CPU")


def run(options: Options) -> int:
    """Run a phase.

    Args:
        options: those above.

    Returns:
        0, or 1 if a section failed.

    Raises:
        ValueError: there is no GPU, or no such section.
    """
    name = "flora-gpu-rehearsal" if options.rehearse else "flora-gpu"
    return PHASES[options.phase].run(
        options.folder or Path(tempfile.gettempdir(), name),
        minutes=options.minutes,
        rehearse=options.rehearse,
        only=options.sections,
    )
