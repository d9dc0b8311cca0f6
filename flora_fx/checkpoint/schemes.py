"""How a checkpoint says that it is quantized, and how its layers are read: one class a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from flora_fx.quantized import QuantizedWeight
from flora_fx.quantized.formats.awq import read_awq
from flora_fx.quantized.formats.bitsandbytes import STATE, read_serialized
from flora_fx.quantized.formats.compressed import bits_of, read_compressed
from flora_fx.quantized.formats.gptq import read_gptq
from flora_fx.quantized.formats.refusal import InexactError

__all__ = ["Scheme", "scheme_of"]


class Scheme(ABC):
    """One way to store quantized layers.

    Args:
        settings: ``quantization_config`` of config.json.

    Raises:
        InexactError: the settings ask for what is not read.

    Attributes:
        marks: what the key of a quantized layer ends in, or holds behind the layer's name.
    """

    marks: ClassVar[str]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def layer(self, key: str) -> str | None:
        """The layer that a key says is quantized; None for any other key."""
        name, found, _ = key.rpartition(self.marks)
        return name if found else None

    @abstractmethod
    def read(self, parts: Mapping[str, Tensor], columns: int) -> QuantizedWeight:
        """The weight of one layer.

        Args:
            parts: all tensors of the layer, by what follows its name.
            columns: in_features of the layer.

        Raises:
            InexactError: it cannot be held as it is.
            KeyError: a part is missing.
        """


class _Grouped(Scheme):
    """What GPTQ and AWQ have in common."""

    marks = ".qweight"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.bits = int(settings.get("bits", settings.get("w_bit", 4)))
        self.group_size = int(settings.get("group_size", settings.get("q_group_size", -1)))


class _Gptq(_Grouped):
    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.format = settings.get("checkpoint_format", "gptq")
        if self.format not in ("gptq", "gptq_v2"):
            raise InexactError(f"GPTQ's checkpoint_format {self.format!r} is laid out for one kernel")
        if settings.get("pack_dtype", "int32") != "int32":
            raise InexactError(f"GPTQ's codes are packed into {settings['pack_dtype']}, not into int32")
        if settings.get("dynamic"):
            raise InexactError("GPTQ's settings differ from layer to layer ('dynamic')")

    def read(self, parts: Mapping[str, Tensor], columns: int) -> QuantizedWeight:
        own = {name: parts[name] for name in ("qweight", "qzeros", "scales")}
        v2 = self.format == "gptq_v2"
        return read_gptq(**own, g_idx=parts.get("g_idx"), bits=self.bits, group_size=self.group_size, v2=v2)


class _Awq(_Grouped):
    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        version = str(settings.get("version", settings.get("format", "gemm"))).lower()
        if version != "gemm":
            raise InexactError(f"AWQ's version {version!r} is laid out for one kernel; version 'gemm' is read")

    def read(self, parts: Mapping[str, Tensor], columns: int) -> QuantizedWeight:
        own = {name: parts[name] for name in ("qweight", "qzeros", "scales")}
        return read_awq(**own, bits=self.bits, group_size=self.group_size)


class _Compressed(Scheme):
    marks = ".weight_packed"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        groups = list((settings.get("config_groups") or {}).values())
        formats = {settings.get("format"), *(group.get("format") for group in groups)} - {None}
        if formats != {"pack-quantized"}:
            told = ", ".join(sorted(map(str, formats))) or "none"
            raise InexactError(f"compressed-tensors' format is {told}; 'pack-quantized' is read")
        if any(group.get("input_activations") or group.get("output_activations") for group in groups):
            raise InexactError("compressed-tensors' settings quantize activations, too")
        if settings.get("kv_cache_scheme"):
            raise InexactError("compressed-tensors' settings quantize the KV cache, too")
        self.bits = {int(group["weights"]["num_bits"]) for group in groups if group.get("weights")}

    def read(self, parts: Mapping[str, Tensor], columns: int) -> QuantizedWeight:
        packed = parts["weight_packed"]
        return read_compressed(
            packed,
            parts["weight_scale"],
            parts.get("weight_zero_point"),
            parts["weight_shape"],
            parts.get("weight_g_idx"),
            bits=bits_of(packed, columns, self.bits),
        )


class _Bitsandbytes(Scheme):
    marks = f".weight.{STATE}"

    def read(self, parts: Mapping[str, Tensor], columns: int) -> QuantizedWeight:
        return read_serialized(parts)


def scheme_of(settings: Mapping[str, Any]) -> Scheme | None:
    """How the layers of a checkpoint are stored; None where transformers has to read them.

    Args:
        settings: ``quantization_config`` of config.json.

    Raises:
        InexactError: by a method that is read, but otherwise than it is read.
    """
    method = settings.get("quant_method")
    if method == "bitsandbytes":
        four = settings.get("load_in_4bit", settings.get("_load_in_4bit"))
        return _Bitsandbytes(settings) if four else None
    known: dict[Any, type[Scheme]] = {"gptq": _Gptq, "awq": _Awq, "compressed-tensors": _Compressed}
    return known[method](settings) if method in known else None
