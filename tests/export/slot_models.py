"""A small model with several LoRAs, and exports whose rows choose among them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from flora_fx.export import export_onnx
from tests.faults.models import ADAPTERS, VOCAB, adapted
from tests.made_once import made_once

__all__ = ["FILLED", "Mixed", "make_mixed", "padded"]

FILLED = ("exported", "lower", "fewer")
"""The adapters of the export with slots, which has two more; its others come from disk."""


def padded(batch: int, longest: int = 7) -> tuple[Tensor, Tensor]:
    """Prompts of several lengths, padded on the left."""
    ids = torch.randint(1, VOCAB, (batch, longest), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : row % 4] = 0
    return ids * mask, mask


@dataclass(frozen=True)
class Mixed:
    """A model with all of `ADAPTERS`.

    Attributes:
        model: of PEFT.
        adapters: where each is saved, in a directory of its name.
        fixed: an export of all of them.
        slots: an export of `FILLED` in five slots of rank 6.
    """

    model: Any
    adapters: Path
    fixed: Path
    slots: Path

    def expected(self, name: str | None, ids: Tensor, mask: Tensor, count: int, **options: Any) -> Tensor:
        """What PyTorch says after one prompt [prompt] with one adapter alone; the new tokens."""
        config = transformers.GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0, **options)
        if name is not None:
            self.model.set_adapter(name)
        layers: Any = self.model.base_model
        layers.enable_adapter_layers() if name is not None else layers.disable_adapter_layers()
        try:
            kept = ids[mask.bool()][None]
            found = self.model.generate(input_ids=kept, attention_mask=torch.ones_like(kept), generation_config=config)
        finally:
            layers.enable_adapter_layers()
        tokens: Tensor = found[0, kept.shape[1] :]
        return tokens


def make_mixed(place: Path) -> Mixed:
    """Export it in both ways."""
    model = adapted(*ADAPTERS, layers=2)
    made_once(place, lambda place: _write(model, place))
    return Mixed(model, place / "adapters", place / "fixed", place / "slots")


def _write(model: Any, place: Path) -> None:
    model.save_pretrained(place / "adapters")
    export_onnx(model, place / "fixed", adapters=list(ADAPTERS))
    export_onnx(model, place / "slots", adapters=FILLED, slots=5, rank=6)
