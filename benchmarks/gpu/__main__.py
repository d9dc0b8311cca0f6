"""One section in this process, as the phases start it: ``python -m benchmarks.gpu PHASE SECTION FOLDER [rehearse]``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from . import PHASES
from .folder import Folder
from .plan import plan


def main(phase_name: str, section_name: str, folder: str, *rehearse: str) -> None:
    """Run a section, and keep each result that it gives: a later one holds the earlier ones.

    Args:
        phase_name, section_name: which.
        folder: of the phases.
        rehearse: anything, to rehearse.
    """
    warnings.simplefilter("ignore")  # deprecations inside transformers
    phase, place, asked = PHASES[phase_name], Folder(Path(folder)), plan(rehearse=bool(rehearse))
    torch.set_num_threads(phase.threads(asked))
    [section] = [section for section in phase.sections(asked) if section.name == section_name]
    for result in section.work(asked, place):
        place.keep(phase.name, section, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
