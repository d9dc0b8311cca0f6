"""Which base and which adapters an export was made of."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AdapterIdentity", "Identity", "identify"]


@dataclass(frozen=True)
class AdapterIdentity:
    """An adapter that was exported.

    Attributes:
        name: in the PEFT model.
        method: PEFT's name of it, such as ``LORA``.
        rank: its `r`; 0 where it has none.
        sha256: of its weights.
    """

    name: str
    method: str
    rank: int
    sha256: str


@dataclass(frozen=True)
class Identity:
    """Base and adapters.

    Attributes:
        base: the name or path that the base was loaded from; empty if it was made on the spot.
        commit: the hub's commit of it; empty if unknown.
        adapters: those that were exported.
    """

    base: str = ""
    commit: str = ""
    adapters: tuple[AdapterIdentity, ...] = field(default_factory=tuple)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Identity:
        """From the JSON of `dataclasses.asdict`."""
        return cls(**{**content, "adapters": tuple(AdapterIdentity(**a) for a in content.get("adapters", ()))})


def identify(model: nn.Module, core: nn.Module, adapters: Sequence[str] | None = None) -> Identity:
    """What a model is made of.

    Args:
        model: as the user gave it: a transformers model or a PEFT model around it.
        core: the transformers model inside.
        adapters: names of those that were exported; None for the active ones.
    """
    config: Any = core.config
    base, commit = getattr(config, "_name_or_path", "") or "", getattr(config, "_commit_hash", None) or ""
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return Identity(base, commit)
    weights = dict(model.named_parameters())
    found = []
    for name in model.active_adapters if adapters is None else adapters:
        settings: Any = model.peft_config[name]
        own = [(key, value) for key, value in sorted(weights.items()) if f".{name}." in f".{key}."]
        rank = getattr(settings, "r", 0)
        method = str(getattr(settings.peft_type, "value", settings.peft_type))
        found.append(AdapterIdentity(name, method, rank if isinstance(rank, int) else 0, _digest(own)))
    return Identity(base, commit, tuple(found))


def _digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, value in weights:
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
