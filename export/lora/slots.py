"""The places for LoRAs in an export whose rows choose among several, and what stands in them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flora_fx.errors import AdapterError

from .reading import Lora

__all__ = ["EMPTY", "Slot", "checked_name", "digest", "rank_of"]


@dataclass(frozen=True)
class Slot:
    """What stands in one place.

    Attributes:
        name: of the LoRA; empty where there is none.
        rank: its highest one; 0 where there is none.
        sha256: of its A's, B's and scales.
    """

    name: str = ""
    rank: int = 0
    sha256: str = ""

    @classmethod
    def of(cls, name: str, lora: Lora) -> Slot:
        """Of a LoRA, under a name."""
        return cls(name, rank_of(lora), digest(lora))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Slot:
        """From the JSON of `dataclasses.asdict`."""
        return cls(content["name"], content["rank"], content["sha256"])


EMPTY = Slot()
"""Where there is no LoRA: its A's and B's are zero."""


def rank_of(lora: Lora) -> int:
    """The highest rank of its layers."""
    return max((layer.down.shape[0] for layer in lora.layers.values()), default=0)


def digest(lora: Lora) -> str:
    """SHA-256 of a LoRA's matrices and scales, by layer; of what is the same, wherever it was read from."""
    found = hashlib.sha256()
    for module, layer in sorted(lora.layers.items()):
        found.update(f"{module} {layer.scale!r}".encode())
        for matrix in (layer.down, layer.up):
            found.update(f"{matrix.dtype} {tuple(matrix.shape)}".encode())
            found.update(matrix.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def checked_name(name: str, others: Sequence[str]) -> str:
    """A name for a slot.

    Raises:
        AdapterError: it is empty, the base's, or another slot's.
    """
    if not name or name == "__base__":
        raise AdapterError(f"an adapter cannot be called {name!r}; pass another name=")
    if name in others:
        raise AdapterError(f"{name!r} is in slot {others.index(name)} already; pass slot={name!r}, or another name=")
    return name
