"""A LoRA as PEFT has it, in a directory or in a model: its matrices by layer, and what they are scaled by."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flora_fx.checkpoint import read_adapter
from flora_fx.errors import AdapterError

__all__ = ["Lora", "LoraLayer", "check_settings", "name_of", "read_lora"]

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>[AB])\.weight")
_AS_PLAIN = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "megatron_core", "ensure_weight_tying", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size"),
}
"""Settings that leave a LoRA of linear layers what it is: y + s·B(Ax). PEFT 0.21 has others, such as ``use_dora``."""

_MOVE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that subtract their first A and B from the base."""

_MERGE = "merge it into its base and export that"


@dataclass(frozen=True)
class LoraLayer:
    """What one layer adds: ``scale · up (down x)``.

    Attributes:
        down: A [rank, in].
        up: B [out, rank].
        scale: as PEFT computes it.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Lora:
    """A LoRA.

    Attributes:
        name: for messages.
        layers: by the names that the layers have in the transformers model.
    """

    name: str
    layers: Mapping[str, LoraLayer]


def read_lora(source: str | Path | nn.Module) -> Lora:
    """The matrices of a LoRA; those of a model are its own memory, those of a directory are read when they are used.

    Args:
        source: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id, in a layout
            that `flora_fx.checkpoint.read_adapter` reads; or a PEFT model, whose active adapter is meant.

    Raises:
        AdapterError: no LoRA, one that changes more than the outputs of linear layers, or one that is not whole.
        CheckpointNotFoundError: the directory or one of its files is missing.
        MissingExtraError: safetensors is not installed.
        TypeError: something else than a path or a PEFT model.
    """
    if isinstance(source, str | Path):
        settings, tensors = read_adapter(source)
        check_settings(settings, str(source))
        return _lora(str(source), tensors, lambda module, rank: _scale(settings, module, rank, str(source)))
    peft: Any = sys.modules.get("peft")  # who holds a PEFT model has imported it
    if peft is None or not isinstance(source, peft.PeftModel):
        raise TypeError(f"an adapter is the path of a directory or a PeftModel; this is a {type(source).__name__}")
    if len(source.active_adapters) != 1:
        raise AdapterError(
            f"the model has {len(source.active_adapters)} active adapters; choose one by model.set_adapter(name)"
        )
    (adapter,) = source.active_adapters
    name = f"the model's adapter {adapter!r}"
    check_settings(source.peft_config[adapter].to_dict(), name)
    tensors = peft.get_peft_model_state_dict(source, adapter_name=adapter, save_embedding_layers=False)
    core = source.base_model.model
    return _lora(name, tensors, lambda module, _: float(core.get_submodule(module).scaling[adapter]))


def name_of(source: Any) -> str:
    """What a LoRA is called: the last part of its path or Hub id, or its name in the PEFT model.

    >>> name_of("adapters/sql/")
    'sql'
    """
    return Path(source).name if isinstance(source, str | Path) else str(source.active_adapters[0])


def check_settings(settings: Mapping[str, Any], name: str) -> None:
    """Refuse adapters that are more than ``y + scale · B (A x)`` at linear layers.

    Args:
        settings: as in ``adapter_config.json``.
        name: of the adapter, for messages.

    Raises:
        AdapterError: it is another method than LoRA, a variant of it, or has weights beside A and B.
    """
    method = getattr(settings.get("peft_type"), "value", settings.get("peft_type"))
    if method != "LORA":
        raise AdapterError(f"{name} is of PEFT's type {method}; only a LoRA can replace a LoRA: export it by itself")
    bias, start = settings.get("bias", "none"), settings.get("init_lora_weights")
    more = [f"{key}={value!r}" for key, value in settings.items() if value and key not in _AS_PLAIN]
    if bias not in ("none", None):
        more.append(f"bias={bias!r}")
    if more:
        raise AdapterError(f"{name} has {', '.join(more)}: it is more than the A and B of a LoRA; {_MERGE}")
    if isinstance(start, str) and start.lower().startswith(_MOVE_BASE):
        raise AdapterError(
            f"{name} has init_lora_weights={start!r}, which changes the base; save it with "
            "path_initial_model_for_weight_conversion, as PEFT's documentation has it"
        )


def _lora(name: str, tensors: Mapping[str, Tensor], scale: Callable[[str, int], float]) -> Lora:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{name} has {key}, which is no A or B of a linear layer; {_MERGE}")
        found.setdefault(match["module"], {})[match["which"]] = tensor.detach()
    layers = {}
    for module, pair in found.items():
        if len(pair) != 2:
            (which,) = pair
            missing = "B" if which == "A" else "A"
            raise AdapterError(f"{name} has lora_{which} of {module} and no lora_{missing}; save the adapter again")
        down, up = pair["A"], pair["B"]
        if not down.dim() == up.dim() == 2 or not 0 < down.shape[0] == up.shape[1]:
            raise AdapterError(
                f"{name}: A of {module} is {list(down.shape)} and B {list(up.shape)}, which must be [rank, in] and "
                "[out, rank]; save the adapter again"
            )
        layers[module] = LoraLayer(down, up, scale(module, down.shape[0]))
    return Lora(name, layers)


def _scale(settings: Mapping[str, Any], module: str, rank: int, name: str) -> float:
    told = _by_pattern(settings, "rank_pattern", module, settings.get("r", 8))
    if told != rank:
        raise AdapterError(
            f"{name}: A and B of {module} have rank {rank}, and adapter_config.json says {told}; save the adapter again"
        )
    alpha = _by_pattern(settings, "alpha_pattern", module, settings.get("lora_alpha", 8))
    if not isinstance(alpha, int | float):
        raise AdapterError(f"{name}: lora_alpha of {module} is {alpha!r}, which must be a number")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _by_pattern(settings: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """What the first pattern that fits says, as PEFT 0.21 matches them (`peft.utils.other.get_pattern_key`).

    >>> _by_pattern({"rank_pattern": {"v_proj": 3}}, "rank_pattern", "layers.0.v_proj", 8)
    3
    """
    for pattern, value in (settings.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
