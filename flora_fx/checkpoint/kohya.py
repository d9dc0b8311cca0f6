"""Adapters of kohya's scripts: one file without a config, the names of layers with ``_`` for every dot."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flora_fx.errors import AdapterError

from .layouts import AS_PEFT, KOHYA, as_peft, refuse_pipelines
from .places import ADAPTER_FILE, MLX_FILE
from .wording import examples

__all__ = ["kohya_to_peft", "lone_file"]

_KOHYA_PARTS = {"lora_down.weight", "lora_up.weight", "alpha"}


def lone_file(directory: Path) -> Path | None:
    """The file of an adapter that comes without a config: the only safetensors of a directory that is no model."""
    files = sorted(directory.glob("*.safetensors"))
    known = (directory / "config.json").is_file() or any(file.name in (ADAPTER_FILE, MLX_FILE) for file in files)
    return files[0] if len(files) == 1 and not known else None


def kohya_to_peft(
    tensors: Mapping[str, Tensor], path: Path, modules: Collection[str] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What kohya's scripts trained: up [out, rank], down [rank, in], times alpha / rank; names with ``_`` for ``.``.

    Args:
        tensors: of the file.
        path: of the file, for messages.
        modules: names of the model's; None where no model is at hand.

    Raises:
        AdapterError: another layout, another model, or more than ``B (A x)``.
    """
    refuse_pipelines(tensors, path)
    matches = {key: KOHYA.fullmatch(key) for key in tensors}
    if odd := [key for key, match in matches.items() if match is None]:
        raise AdapterError(
            f"{path} has no adapter_config.json beside it, and {odd[0]} is no name of kohya's; {AS_PEFT}"
        )
    found = {key: match for key, match in matches.items() if match is not None}
    if odd := [key for key, match in found.items() if match["which"] not in _KOHYA_PARTS]:
        raise AdapterError(
            f"{path} is kohya's and more than a LoRA of linear layers{examples(odd)}; merge it into its base with "
            "kohya's scripts"
        )
    parts = sorted({match["part"] for match in found.values()})
    if len(parts) > 1 or parts == ["lora_unet"]:
        raise AdapterError(
            f"{path} is kohya's LoRA of a diffusion pipeline ({', '.join(parts)}), not of one transformers model; load "
            "it with diffusers' pipeline.load_lora_weights(...) and pass the pipeline's unet to flora_fx.capture"
        )
    if modules is None:
        raise AdapterError(
            f"{path} is kohya's, whose names say which layer is meant only beside the model; load it with load_model "
            "and save it with PeftModel.save_pretrained()"
        )
    # Before transformers 5 CLIP's text model had all its layers in a module ``text_model``: kohya's names have it.
    names = {name.replace(".", "_"): name for name in modules}
    names = {f"text_model_{flat}": name for flat, name in names.items()} | names
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, match in found.items():
        module = names.get(match["module"])
        if module is None:
            raise AdapterError(
                f"{path}: {key} is of no layer of this model; is it the adapter of another model (an unet, another "
                "text encoder)?"
            )
        if match["which"] == "alpha":
            alphas[module] = float(tensors[key])
        else:
            which = "A" if match["which"].startswith("lora_down") else "B"
            pairs.setdefault(module, {})[which] = tensors[key]
    ranks = {module: pair["A"].shape[0] for module, pair in pairs.items() if "A" in pair}
    scaled = {module: alphas.get(module, float(rank)) for module, rank in ranks.items()}
    if odd := [module for module, alpha in scaled.items() if not math.isfinite(alpha) or alpha == 0]:
        raise AdapterError(f"{path}: alpha of {odd[0]} is {scaled[odd[0]]}, which must be a number and not 0")
    return as_peft(pairs, ranks, scaled)
