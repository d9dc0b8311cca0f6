"""Adapters of mlx-lm: ``y + scale · (x a) b``, a [in, rank], b [rank, out]."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flora_fx.errors import AdapterError

from .layouts import as_peft
from .wording import shape

__all__ = ["is_mlx", "mlx_to_peft"]


def is_mlx(settings: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is mlx-lm's.

    >>> is_mlx({"fine_tune_type": "lora"}), is_mlx({"peft_type": "LORA"})
    (True, False)
    """
    return "peft_type" not in settings and ("lora_parameters" in settings or "fine_tune_type" in settings)


def mlx_to_peft(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What mlx-lm trained: ``y + scale · (x a) b``, a [in, rank], b [rank, out].

    Raises:
        AdapterError: no LoRA of linear layers, or one whose scale is not certain.
    """
    kind, parameters = settings.get("fine_tune_type", "lora"), settings.get("lora_parameters")
    fuse = "fuse it into its base with mlx_lm.fuse and export that"
    if kind != "lora":
        raise AdapterError(f"{path} was trained by MLX with fine_tune_type {kind!r}; only 'lora' is read here: {fuse}")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise AdapterError(
            f"{path.parent}: adapter_config.json is MLX's and names no scale in lora_parameters; put the file there "
            "that mlx_lm.lora wrote"
        )
    if isinstance(parameters, dict) and parameters.get("alpha") is not None:
        raise AdapterError(
            f"{path.parent}: adapter_config.json is MLX's and names alpha and scale, which versions of MLX computed "
            f"with in different ways; {fuse}"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, which = key.rpartition(".")
        if which not in ("lora_a", "lora_b") or tensor.dim() != 2:
            raise AdapterError(
                f"{path}: {key} ({shape(tensor.shape)}) is no lora_a or lora_b of a linear layer, and "
                f"adapter_config.json is MLX's; {fuse}, or put the adapter's own adapter_config.json beside it"
            )
        pairs.setdefault(module, {})["A" if which == "lora_a" else "B"] = tensor.t().contiguous()
    ranks = {module: pair["A"].shape[0] for module, pair in pairs.items() if "A" in pair}
    scales = {module: scale * rank for module, rank in ranks.items()}
    return as_peft(pairs, ranks, scales)
