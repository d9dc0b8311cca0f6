"""What becomes of a base that is held in few bits: kept so, dequantized by the graph, or written as plain weights.

    keep         ``MatMulNBits`` or ``MatMulBnb4``: few bits in the file and in memory
    dequantize   few bits in the file; nodes that read weights alone, which ONNX Runtime computes once, as it loads
    float        plain weights, in the file as well

All three multiply with the same numbers. What differs is size, and speed: MatMulBnb4 dequantizes all of a weight at
each call (ONNX Runtime 1.31 on a CPU: 12 times the time of a float32 product of one token), so that codebooks are
dequantized where nothing else is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from flora_fx.errors import ExportError
from flora_fx.quantized import Kind, QuantizedLinear, QuantizedWeight
from flora_fx.quantized.weight import pack_codes

from .model import DTYPES

__all__ = ["Activations", "Base", "QuantizedBase", "Stored", "check_options", "settle_base"]

Base = Literal["keep", "dequantize", "float"]
Activations = Literal["exact", "int8"]
Stored = Literal["keep", "dequantize"]

_BLOCKS = (256, 128, 64, 32, 16)
"""Those that the operators take (ONNX Runtime 1.31, on a CPU), the largest first."""

_LEVELS: Mapping[Activations, int] = {"exact": 1, "int8": 4}
"""MatMulNBits' ``accuracy_level``: 1 multiplies in float32, 4 rounds what it multiplies with to int8."""


@dataclass(frozen=True)
class QuantizedBase:
    """How the quantized layers of a model are written.

    Attributes:
        layers: their weights as the source has them, by the names that the layers have in the model that is traced.
        forms: what becomes of each kind.
        activations: what a kept affine weight is multiplied with.
    """

    layers: Mapping[str, QuantizedWeight]
    forms: Mapping[Kind, Stored]
    activations: Activations

    @property
    def accuracy_level(self) -> int:
        """Of MatMulNBits."""
        return _LEVELS[self.activations]

    def unkept(self, asked: Base | None, why: str) -> QuantizedBase:
        """The same with nothing kept, for a graph that has no operators for codes.

        Args:
            asked: what the caller asked for.
            why: the graph is such a one.

        Raises:
            ExportError: to keep them.
        """
        if asked == "keep" or self.activations != "exact":
            name = "base='keep'" if asked == "keep" else f"activations={self.activations!r}"
            raise ExportError(f"{name} is for target 'decoder'; {why}. base='dequantize' is for any")
        return replace(self, forms=dict.fromkeys(self.forms, "dequantize"))


def check_options(base: object, activations: object) -> None:
    """Refuse what no export has.

    Raises:
        ValueError: an unknown one.
    """
    for name, given, known in (
        ("base", base, (None, *get_args(Base))),
        ("activations", activations, get_args(Activations)),
    ):
        if given not in known:
            raise ValueError(f"{name} is {given!r}; it must be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}")


def settle_base(
    model: nn.Module, base: Base | None, activations: Activations, dtype: torch.dtype | None = None
) -> QuantizedBase | None:
    """Decide, and make the layers of a private model such as they are written; what they compute stays.

    Args:
        model: a private copy, in the export's dtype.
        base: what is asked for; None for what suits each kind of weight.
        activations: what kept weights are multiplied with.
        dtype: of the export; None for that of the model.

    Returns:
        None where no layer is quantized any more.

    Raises:
        ExportError: none is, and ``base`` or ``activations`` ask for it; or what is asked for is not exact.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    if not layers:
        asked = f"base={base!r}" if base else f"activations={activations!r}" if activations != "exact" else ""
        if asked:
            raise ExportError(f"{asked} is for a quantized base, and no layer of this model is quantized; leave it out")
        return None
    dtype = dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    sources = {name: layer.quantized for name, layer in layers.items()}
    if base == "float":
        if activations != "exact":
            raise ExportError(f"activations={activations!r} is for base='keep'; plain weights are not multiplied so")
        for name, layer in layers.items():
            model.set_submodule(name, layer.dequantize(dtype))
        return None
    refused = {name: why for name, weight in sources.items() if (why := _why_not_kept(weight, dtype))}
    forms: dict[Kind, Stored] = {}
    for kind in dict.fromkeys(weight.kind for weight in sources.values()):
        of_kind = [name for name in refused if sources[name].kind == kind]
        if base == "keep" and of_kind:
            raise ExportError(f"base='keep' cannot hold {of_kind[0]}: {refused[of_kind[0]]}")
        suits = kind == "affine" and not of_kind
        forms[kind] = base or ("keep" if suits else "dequantize")
    if activations != "exact" and forms.get("affine") != "keep":
        raise ExportError(
            f"activations={activations!r} is for MatMulNBits, which no layer of this model is written as; leave it out"
        )
    for name, layer in layers.items():
        if forms[layer.kind] == "keep":
            model.set_submodule(name, QuantizedLinear(_in_blocks(sources[name]), layer.bias))
    return QuantizedBase(sources, forms, activations)


def _why_not_kept(weight: QuantizedWeight, dtype: torch.dtype) -> str:
    """Why a weight has no exact operator of its own; ``""`` where it has one."""
    if _block(weight) is None:
        return (
            f"its groups are of {weight.block}, and none of ONNX Runtime's blocks ({', '.join(map(str, _BLOCKS))}) "
            "divides them; base='dequantize' takes any"
        )
    if weight.kind == "affine" and not torch.equal(weight.scales.to(dtype).float(), weight.scales.float()):
        held = next((name for name, wide in DTYPES.items() if wide == weight.scales.dtype), "float32")
        return (
            f"{str(dtype).removeprefix('torch.')} does not hold its scales exactly; pass dtype=torch.{held}, or "
            "base='dequantize', which computes in float32"
        )
    return ""


def _block(weight: QuantizedWeight) -> int | None:
    """The largest block of the operators' that a weight can be cut into."""
    if weight.kind == "affine" and weight.block >= weight.shape[1]:  # one block a row: any will do
        return next((size for size in reversed(_BLOCKS) if size >= weight.shape[1]), _BLOCKS[0])
    return next((size for size in _BLOCKS if weight.block % size == 0), None)


def _in_blocks(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight in blocks of the operators': each part of a block has the scale and zero point of the whole."""
    block = _block(weight)
    assert block is not None
    if block == weight.block:
        return weight
    if weight.kind != "affine":
        return replace(weight, block=block, scales=weight.scales.repeat_interleave(weight.block // block))
    starts = torch.arange(0, weight.shape[1], block) // weight.block
    return replace(
        weight,
        block=block,
        codes=pack_codes(weight.unpacked(), weight.bits, block),
        scales=weight.scales[:, starts],
        zeros=None if weight.zeros is None else weight.zeros[:, starts],
    )
