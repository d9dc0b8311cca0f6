"""The tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flora_fx.errors import AdapterError, require

from .places import resolve
from .wording import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(model: str | Path, adapter: str | Path | None = None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that lies in a checkpoint or in an exported directory.

    Trainers save one beside the adapter, with its chat template and new tokens: where there is one, it is taken.

    Args:
        model: a directory or a Hub id.
        adapter: of the adapter on it, likewise.

    Returns:
        The tokenizer, or None where neither directory has one.

    Raises:
        CheckpointNotFoundError: no such directory or Hub repository.
        AdapterError: tokenizer files that transformers cannot read.
        MissingExtraError: transformers is not installed.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as empty:
    ...     print(load_tokenizer(empty))
    None
    """
    places = [resolve(model)] if adapter is None else [resolve(adapter), resolve(model)]
    directory = next((place for place in places if any((place / name).is_file() for name in _TOKENIZER_FILES)), None)
    if directory is None:
        return None
    transformers = require("transformers", "hf")
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise AdapterError(
            f"{directory}: the tokenizer cannot be read ({first_line(error)}); copy its files again from the checkpoint"
        ) from error
