"""An adapter as it lies on disk: settings and tensors, in PEFT's layout."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from flora_fx.checksums import check_sum
from flora_fx.errors import AdapterError, CheckpointNotFoundError

from .files import check_safetensors, read_json, read_tensors, refuse_pickles
from .kohya import kohya_to_peft, lone_file
from .layouts import with_peft_names
from .mlx import is_mlx, mlx_to_peft
from .places import ADAPTER_CONFIG, ADAPTER_FILE, MLX_FILE, resolve

__all__ = ["METHODS", "adapter_file", "read_adapter"]

METHODS = {"LORA": ".lora_", "FLORA": ".flora_"}
"""What can be read, by PEFT's name of it, and what is in the names of its tensors."""


def read_adapter(
    adapter: str | Path, *, verify: bool = True, modules: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of an adapter (LoRA or FFBA) in PEFT's layout; the numbers are not looked at.

    Layouts of other tools are read where that is exact, see `flora_fx.checkpoint.layouts`.

    Args:
        adapter: directory with ``adapter_config.json`` and ``adapter_model.safetensors`` (of mlx-lm:
            ``adapters.safetensors``), or a Hub id; or a directory with one safetensors file of kohya's.
        verify: as in `load_model`.
        modules: names of the model's modules, which kohya's names are told by.

    Raises:
        CheckpointNotFoundError: the directory or one of its files is missing.
        AdapterError: files that cannot be read (truncated, pickles only) or are not what was saved, an adapter of
            another kind, or a layout that cannot be read exactly.
        MissingExtraError: safetensors is not installed.
    """
    directory = resolve(adapter)
    path = adapter_file(directory)
    if not (directory / ADAPTER_CONFIG).is_file():
        return kohya_to_peft(read_tensors(path, verify=verify), path, modules)
    settings = read_json(directory / ADAPTER_CONFIG)
    if not is_mlx(settings) and settings.get("peft_type") not in METHODS:
        raise AdapterError(
            f"{directory} has peft_type {settings.get('peft_type')!r}; only 'LORA' and 'FLORA' (FFBA) are supported: "
            "merge the adapter with peft"
        )
    if not path.is_file():
        refuse_pickles(directory, "PeftModel.from_pretrained(...).save_pretrained(...) writes safetensors")
        raise CheckpointNotFoundError(
            f"{directory} has an {ADAPTER_CONFIG} but no {path.name}; it is half written: save or download it again"
        )
    check_safetensors(path)
    if verify:
        check_sum(directory / ADAPTER_CONFIG)
    tensors = read_tensors(path, verify=verify)
    return mlx_to_peft(settings, tensors, path) if is_mlx(settings) else (settings, with_peft_names(tensors, path))


def adapter_file(directory: Path) -> Path:
    """Where the tensors of an adapter are, or should be.

    Raises:
        CheckpointNotFoundError: the directory holds no adapter.
    """
    if (directory / ADAPTER_CONFIG).is_file():
        mlx = not (directory / ADAPTER_FILE).is_file() and is_mlx(read_json(directory / ADAPTER_CONFIG))
        return directory / (MLX_FILE if mlx else ADAPTER_FILE)
    if (lone := lone_file(directory)) is not None:
        return lone
    hint = (
        "this is a model; pass it as the model"
        if (directory / "config.json").is_file()
        else "pass a directory written by PeftModel.save_pretrained()"
    )
    raise CheckpointNotFoundError(f"{directory} has no {ADAPTER_CONFIG}; {hint}")
