"""Layers with the adapters of several rows: in the place of PEFT's, with its weights under their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .selection import Selection

__all__ = ["MixedFlora", "MixedLora"]


class MixedLora(nn.Module):
    """``y = base(x) + Σ scale_i · rows_i(up_i(down_i(x)))``, where rows_i are those whose id is i, and zero elsewhere.

    Args:
        layer: PEFT's LoRA layer. Its submodules are taken over as they are.
        adapters: all names, in the order of their ids; those that this layer does not have are left out.
        selection: which row has which.
    """

    def __init__(self, layer: Any, adapters: Sequence[str], selection: Selection) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        self.indices = {name: index for index, name in enumerate(adapters) if name in layer.lora_A}
        self.lora_dropout = nn.ModuleDict({name: layer.lora_dropout[name] for name in self.indices})
        self.lora_A = nn.ModuleDict({name: layer.lora_A[name] for name in self.indices})
        self.lora_B = nn.ModuleDict({name: layer.lora_B[name] for name in self.indices})
        self.scaling: Mapping[str, float | Tensor] = {name: layer.scaling[name] for name in self.indices}
        self.selection = selection
        self.train(layer.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = result = self.base_layer(x, *args, **kwargs)
        for name, index in self.indices.items():
            down: Any = self.lora_A[name]
            low = down(self.lora_dropout[name](x.to(down.weight.dtype)))
            # Behind the up-projection, so that its bias is selected, too, and no infinity of it meets a zero.
            result = result + self.selection.rows(index, self.lora_B[name](low)) * self.scaling[name]
        return result.to(base.dtype)


class MixedFlora(nn.Module):
    """One module with its part of several FFBA adapters: what it reads for all rows, it writes into those of each.

    Args:
        layer: our `FloraLayer`. Its submodules are taken over as they are.
        adapters: all names, in the order of their ids; those that this layer does not have are left out.
        selection: which row has which.
    """

    def __init__(self, layer: Any, adapters: Sequence[str], selection: Selection) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        self.name: str = layer.name
        self.indices = {name: i for i, name in enumerate(adapters) if name in layer.flora_A or name in layer.flora_B}
        self.flora_A = nn.ModuleDict({name: layer.flora_A[name] for name in self.indices if name in layer.flora_A})
        self.flora_B = nn.ModuleDict({name: layer.flora_B[name] for name in self.indices if name in layer.flora_B})
        self.flora_dropout = nn.ModuleDict({name: layer.flora_dropout[name] for name in self.flora_A})
        self.activation = dict(layer.activation)
        self.scaling = dict(layer.scaling)
        self.reads, self.writes = dict(layer.reads), dict(layer.writes)
        self.selection = selection
        self.train(layer.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = result = self.base_layer(x, *args, **kwargs)
        for name, index in self.indices.items():
            if name in self.flora_A:
                down: Any = self.flora_A[name]
                low = down(self.flora_dropout[name](x.to(down.weight.dtype)))
                if (activation := self.activation[name]) is not None:
                    low = getattr(F, activation)(low)
                self.reads[name].put(low)
            if name in self.flora_B:
                up: Any = self.flora_B[name]
                low = self.writes[name].take(self.name).to(up.weight.dtype)
                if low.dim() != result.dim():  # OPT flattens what its MLP reads
                    low = low.reshape(*result.shape[:-1], low.shape[-1])
                result = result + self.selection.rows(index, up(low)) * self.scaling[name]
        return result.to(base.dtype)
