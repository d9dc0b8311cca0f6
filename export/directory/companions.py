"""What every export has beside its graphs: what loads its tokenizer, and says how its model generates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["write_companions"]


def write_companions(place: Path, core: nn.Module, reference: nn.Module, tokenizer: Any) -> None:
    """Write ``config.json``, ``generation_config.json`` and the tokenizer's files.

    Args:
        place: the directory.
        core: the transformers model.
        reference: its private copy in the export's dtype.
        tokenizer: of transformers; None for none.
    """
    config: Any = copy.deepcopy(reference.config)
    config.architectures = [type(core).__name__]
    config.to_json_file(place / "config.json")
    generation: Any = getattr(core, "generation_config", None)
    if generation is not None:
        generation.to_json_file(place / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
