"""Are the files of a checkpoint whole, and of a kind that runs no code as it is read?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from flora_fx.checksums import check_sum
from flora_fx.errors import AdapterError, CheckpointNotFoundError, require

from .places import ADAPTER_CONFIG
from .wording import examples, first_line

__all__ = ["check_model_files", "check_safetensors", "read_json", "read_tensors", "refuse_pickles", "weight_files"]

_MODEL_FILE = "model.safetensors"
_MODEL_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_model_files(directory: Path, *, verify: bool) -> None:
    """Config and weights of a base are all there, and whole; the weights are not read.

    Raises:
        CheckpointNotFoundError: a file is missing, or this is an adapter.
        AdapterError: a file is truncated, a pickle, or not what was saved.
    """
    if not (directory / "config.json").is_file():
        if (directory / ADAPTER_CONFIG).is_file():
            raise CheckpointNotFoundError(
                f"{directory} is an adapter, not a model; pass it as the adapter, with its base model"
            )
        raise CheckpointNotFoundError(f"{directory} has no config.json; pass a directory written by save_pretrained()")
    read_json(directory / "config.json")
    paths = weight_files(directory)
    for path in paths:
        check_safetensors(path)
    for path in (directory / "config.json", *paths) if verify else ():
        check_sum(path)


def weight_files(directory: Path) -> list[Path]:
    """The files of the weights, one or the shards that the index names. All of them exist.

    Raises:
        CheckpointNotFoundError: one is missing.
        AdapterError: there are pickles alone.
    """
    if (directory / _MODEL_INDEX).is_file():
        shards = sorted(set(read_json(directory / _MODEL_INDEX).get("weight_map", {}).values()))
        missing = [name for name in shards if not (directory / name).is_file()]
        if missing or not shards:
            raise CheckpointNotFoundError(
                f"{directory}: of {len(shards)} shards that {_MODEL_INDEX} names, {len(missing)} are missing"
                f"{examples(missing)}; it is half written or half downloaded: save or download it again"
            )
        return [directory / name for name in shards]
    if (directory / _MODEL_FILE).is_file():
        return [directory / _MODEL_FILE]
    refuse_pickles(directory, "AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors")
    raise CheckpointNotFoundError(
        f"{directory} has a config.json but no weights ({_MODEL_FILE} or {_MODEL_INDEX}); "
        "it is half written or half downloaded: save or download it again"
    )


def refuse_pickles(directory: Path, remedy: str) -> None:
    """
    Raises:
        AdapterError: there are pickles.
    """
    pickles = [path.name for pattern in _PICKLES for path in sorted(directory.glob(pattern))]
    if pickles:
        raise AdapterError(
            f"{directory} holds its weights as pickles only{examples(pickles)}; loading those can run code: {remedy}"
        )


def check_safetensors(path: Path) -> None:
    """Open the header, which also compares the length that it promises with the file's.

    Raises:
        AdapterError: it is not whole.
    """
    safetensors = require("safetensors", "hf")
    try:
        with safetensors.safe_open(path, framework="pt"):
            pass
    except safetensors.SafetensorError as error:
        raise AdapterError(
            f"{path} is not a whole safetensors file ({first_line(error)}); "
            "it is truncated or a Git LFS pointer: save or download it again"
        ) from error


def read_tensors(path: Path, *, verify: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, in the order of the names.

    Raises:
        AdapterError: it is not whole, not what was saved, or empty.
    """
    check_safetensors(path)
    if verify:
        check_sum(path)
    # Read, not mapped: each tensor of a mapped file leaves 64 bytes behind (safetensors 0.8.0), for every swap.
    found: dict[str, Tensor] = require("safetensors.torch", "hf").load(path.read_bytes())
    if not found:
        raise AdapterError(f"{path} holds no tensors; save the adapter again")
    return dict(sorted(found.items()))


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        AdapterError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON ({first_line(error)}); save or download it again") from error
    if not isinstance(content, dict):
        raise AdapterError(
            f"{path} holds a {type(content).__name__} where an object is expected; save or download it again"
        )
    return content
