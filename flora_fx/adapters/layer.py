"""One module with its part of an FFBA adapter: the end that reads, the end that writes, or both."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flora_fx.errors import AdapterError

from .config import FloraConfig
from .link import Link

__all__ = ["FloraLayer"]


class FloraLayer(nn.Module, BaseTunerLayer):
    """``y = base(x)``, where this module reads ``z = activation(A·dropout(x))``, where it writes ``y + s·B·z``.

    Args:
        base_layer: a linear layer, or for an adapter that reads before a norm, that norm.
        name: of the module, for messages.
    """

    adapter_layer_names = ("flora_A", "flora_B")
    other_param_names = ("scaling", "activation", "flora_dropout", "reads", "writes")

    # From BaseTunerLayer, which is not typed.
    active_adapters: list[str]
    set_adapter: Any
    get_base_layer: Any
    _cast_input_dtype: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.flora_A = nn.ModuleDict()
        self.flora_B = nn.ModuleDict()
        self.flora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.activation: dict[str, str | None] = {}
        self.reads: dict[str, Link] = {}
        self.writes: dict[str, Link] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def attach(
        self, adapter: str, config: FloraConfig, reads: tuple[Link, int] | None, writes: tuple[Link, int] | None
    ) -> None:
        """Add an adapter's ends.

        Args:
            adapter: its name.
            config: its configuration.
            reads: the link to put z in, and A's in_features; None where nothing is read.
            writes: the link to take z from, and B's out_features; None where nothing is written.
        """
        if reads is not None:
            self.reads[adapter], features = reads
            self.flora_A[adapter] = nn.Linear(features, config.r, bias=False)
            self.flora_dropout[adapter] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
            self.activation[adapter] = config.activation
        if writes is not None:
            self.writes[adapter], features = writes
            self.flora_B[adapter] = nn.Linear(config.r, features, bias=False)
            self.scaling[adapter] = config.scaling
        self._initialise(adapter, config)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initialise(self, adapter: str, config: FloraConfig) -> None:
        if adapter in self.flora_A:
            down: Any = self.flora_A[adapter]
            if config.init == "gaussian":
                nn.init.normal_(down.weight, std=1 / config.r)
            elif config.init == "orthogonal":
                with torch.no_grad():  # a QR factorization, which half precision does not have
                    down.weight.copy_(nn.init.orthogonal_(torch.empty(down.weight.shape, dtype=torch.float32)))
            else:
                nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        if adapter in self.flora_B:
            up: Any = self.flora_B[adapter]
            if config.init == "random":
                nn.init.kaiming_uniform_(up.weight, a=math.sqrt(5))
            else:
                nn.init.zeros_(up.weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.flora_A:
                down: Any = self.flora_A[adapter]
                z = down(self.flora_dropout[adapter](self._cast_input_dtype(x, down.weight.dtype)))
                if (activation := self.activation[adapter]) is not None:
                    z = getattr(F, activation)(z)
                self.reads[adapter].put(z)
            if adapter in self.flora_B:
                up: Any = self.flora_B[adapter]
                z = self._cast_input_dtype(self.writes[adapter].take(self.name), up.weight.dtype)
                if z.dim() != result.dim():  # OPT flattens what its MLP reads
                    z = z.reshape(*result.shape[:-1], z.shape[-1])
                result = result + up(z) * self.scaling[adapter]
        return result if result.dtype == dtype else result.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible.

        Raises:
            AdapterError: always; the message says why.
        """
        raise AdapterError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Not possible: nothing is ever merged.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(CANNOT_MERGE)

    def __repr__(self) -> str:
        return "flora." + super().__repr__()


CANNOT_MERGE = (
    "an FFBA adapter cannot be merged: its path begins at the input of one projection and ends at the output of "
    "another (and may hold an activation), so no single weight could take it up. Fuse it instead, which costs hardly "
    "more than the base: flora_fx.fuse(flora_fx.capture(model, ...)), torch.compile(model, backend='flora') or "
    "flora_fx.export.export_onnx; unload() gives the base model back."
)
