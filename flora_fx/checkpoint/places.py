"""Where a checkpoint lies: a directory here, or a repository of the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from flora_fx.errors import CheckpointNotFoundError, require

from .wording import first_line

__all__ = ["ADAPTER_CONFIG", "ADAPTER_FILE", "MLX_FILE", "resolve"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
MLX_FILE = "adapters.safetensors"

# What one checkpoint needs from a Hub repository; no pickles, no second copies of the weights.
_HUB_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "model.safetensors",
    "model-*.safetensors",
    ADAPTER_FILE,
    MLX_FILE,
    "pytorch_lora_weights.safetensors",  # to be told what it is
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(name: str | Path) -> Path:
    """The local directory of a checkpoint; a Hub id is downloaded first (or found in the Hub's cache).

    Raises:
        CheckpointNotFoundError: no such directory or repository.
        MissingExtraError: a Hub id, and huggingface_hub is not installed.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointNotFoundError(f"'{path}' is a file; pass the directory that holds it")
    if isinstance(name, Path) or _HUB_ID.fullmatch(name) is None:
        raise CheckpointNotFoundError(f"no directory '{name}'; check the path")
    hub = require("huggingface_hub", "hf")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise CheckpointNotFoundError(
            f"'{name}' is neither a directory here nor a repository that the Hub delivered "
            f"({first_line(error)}); check the spelling, the network, or `hf auth login`"
        ) from error
