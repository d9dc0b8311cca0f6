"""Models with quantized layers of other libraries: a copy in which they are `QuantizedLinear`.

    Linear4bit(weight=Params4bit)    Linear(weight=Int8Tensor)    Linear(weight_packed=…)    →    QuantizedLinear

The libraries are not imported: what a layer is, is told by its class's name and its parts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.quantized.linear import QuantizedLinear
from flora_fx.quantized.weight import QuantizedWeight

from .bitsandbytes import read_state
from .compressed import read_compressed
from .refusal import InexactError
from .torchao import TENSORS, read_torchao

__all__ = ["REMEDY", "Copied", "with_quantized_linears"]

REMEDY = (
    "hold the base in floating point: load it without quantization, or call its dequantize(), where transformers has "
    "one for it, before the adapter is put on"
)

_OUTLIERS = "LLM.int8 quantizes its activations and keeps outliers apart, anew at each call"
_FLOAT_ZEROS = "torchao's int4 has float zero points, which are no codes"
_CODEBOOK_OF_VECTORS = "its codes stand for vectors, not for numbers"
_OTHER_FLOATS = "it computes in floating point of 8 or 4 bits, with scales of activations"
_FROM_CHECKPOINT = (
    "its packing was changed for a kernel as it was loaded; flora_fx.checkpoint.load_model reads its checkpoint"
)
_REFUSED = {
    "Linear8bitLt": _OUTLIERS,
    "Int8Params": _OUTLIERS,
    "Embedding4bit": "an embedding in 4 bits is no linear layer",
    "HQQLinear": "HQQ has float zero points, which are no codes",
    "Int4Tensor": _FLOAT_ZEROS,
    "Int4TilePackedTo4dTensor": _FLOAT_ZEROS,
    "Int4PlainInt32Tensor": _FLOAT_ZEROS,
    "Int4PreshuffledTensor": _FLOAT_ZEROS,
    "Int4OpaqueTensor": _FLOAT_ZEROS,
    "Float8Tensor": _OTHER_FLOATS,
    "NVFP4Tensor": _OTHER_FLOATS,
    "MXTensor": _OTHER_FLOATS,
    "FP8Linear": _OTHER_FLOATS,
    "FbgemmFp8Linear": _OTHER_FLOATS,
    "EetqLinear": "EETQ reorders its 8-bit codes for one GPU's kernel",
    "SpQRLinear": _CODEBOOK_OF_VECTORS,
    "VQuantLinear": _CODEBOOK_OF_VECTORS,
    "HiggsLinear": _CODEBOOK_OF_VECTORS,
}
_PACKAGES = {
    "aqlm": _CODEBOOK_OF_VECTORS,
    "gptqmodel": _FROM_CHECKPOINT,
    "auto_gptq": _FROM_CHECKPOINT,
    "awq": _FROM_CHECKPOINT,
}
"""Why layers of some packages are not read, by the first part of their module."""


@dataclass(frozen=True)
class Copied:
    """A model with `QuantizedLinear` in the place of other libraries' layers.

    Attributes:
        model: a copy of all but the weights, which are shared; the model itself where there was nothing to replace.
        left: the quantized layers that are no `QuantizedLinear`, by name, and why.
    """

    model: nn.Module
    left: dict[str, str]

    def told(self, most: int = 3) -> str:
        """Why layers were left, for an error; ``""`` where none was."""
        if not self.left:
            return ""
        by_reason: dict[str, list[str]] = {}
        for name, why in self.left.items():
            by_reason.setdefault(why, []).append(name)
        parts = [
            f"{', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''}: {why}"
            for why, names in by_reason.items()
        ]
        return f"quantized layers cannot be taken over as they are ({'; '.join(parts)}); {REMEDY}"


@torch.no_grad()
def with_quantized_linears(model: nn.Module) -> Copied:
    """Read every quantized linear layer of a model.

    Args:
        model: left as it is.

    >>> layer = nn.Linear(3, 2)
    >>> with_quantized_linears(layer).model is layer
    True
    """
    normed = {id(module.base_layer) for module in model.modules() if getattr(module, "lora_magnitude_vector", None)}
    found: dict[int, QuantizedLinear] = {}
    weights: dict[int, QuantizedWeight] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        try:
            weight = _read(module, weights)
        except InexactError as why:
            left[name or type(module).__name__] = str(why)
            continue
        if weight is not None and id(module) in normed:
            left[name] = "a DoRA beside it takes the norms of its weight at each call"
        elif weight is not None:
            found[id(module)] = _replacement(module, weight)
    if not found:
        return Copied(model, left)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model)}
    memo.update(found)
    return Copied(copy.deepcopy(model, memo), left)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from (tensor for tensor in module._parameters.values() if tensor is not None)
        yield from (tensor for tensor in module._buffers.values() if tensor is not None)


def _read(module: nn.Module, known: dict[int, QuantizedWeight]) -> QuantizedWeight | None:
    """The weight of a quantized linear layer; None for any other module.

    Args:
        known: weights by the ids of the tensors they were read from: layers that share one share the result.

    Raises:
        InexactError: it is quantized, and cannot be held.
    """
    if isinstance(module, QuantizedLinear):
        return None
    names = {kind.__name__ for kind in type(module).__mro__}
    package = type(module).__module__.partition(".")[0]
    if package == "peft":
        return None  # its layers are named like those that they are around
    why = next((_REFUSED[name] for name in _REFUSED if name in names), None)
    if package in _PACKAGES and module._parameters.keys() | module._buffers.keys():
        why = why or _PACKAGES[package]
    if why is not None:
        raise InexactError(why)
    packed = module._parameters.get("weight_packed", module._buffers.get("weight_packed"))
    tensor = packed if packed is not None else module._parameters.get("weight")
    if tensor is None:
        return None
    if id(tensor) not in known and (weight := _read_tensor(module, tensor)) is not None:
        known[id(tensor)] = weight
    return known.get(id(tensor))


def _read_tensor(module: nn.Module, tensor: Tensor) -> QuantizedWeight | None:
    kinds = [kind.__name__ for kind in type(tensor).__mro__]
    why = next((_REFUSED[name] for name in kinds if name in _REFUSED), None)
    if why is None and type(tensor).__module__.partition(".")[0] == "torchao" and kinds[0] not in TENSORS:
        why = f"torchao's {kinds[0]} is not read"
    quantized = why is not None or "Params4bit" in kinds or kinds[0] in TENSORS or tensor.dtype == torch.int32
    if not quantized:
        return None
    if why is not None:
        raise InexactError(why)
    if not isinstance(module, nn.Linear):
        raise InexactError(f"a {type(module).__name__} is no linear layer")
    if "Params4bit" in kinds:
        state = getattr(tensor, "quant_state", None) or getattr(module, "quant_state", None)
        if state is None:
            raise InexactError("bitsandbytes has not quantized it yet: move the model to its device first")
        return read_state(tensor.data, state)
    return _read_compressed(module) if tensor.dtype == torch.int32 else read_torchao(tensor)


def _read_compressed(module: nn.Module) -> QuantizedWeight | None:
    """A linear layer of compressed-tensors."""
    scheme: Any = getattr(module, "quantization_scheme", None)
    if scheme is None or scheme.weights is None:
        return None
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise InexactError("it quantizes its activations, too")
    parts = {**module._parameters, **module._buffers}
    packed, scale, shape = (parts.get(name) for name in ("weight_packed", "weight_scale", "weight_shape"))
    if packed is None or scale is None or shape is None:
        raise InexactError("its packing is not that of format 'pack-quantized'")
    return read_compressed(
        packed,
        scale,
        parts.get("weight_zero_point"),
        shape,
        parts.get("weight_g_idx"),
        bits=int(scheme.weights.num_bits),
    )


def _replacement(module: nn.Module, weight: QuantizedWeight) -> QuantizedLinear:
    """A layer that is called as the one it stands for: with its bias, its mode and its hooks."""
    layer = QuantizedLinear(weight, module._parameters.get("bias")).train(module.training)
    for name in _HOOKS:
        setattr(layer, name, getattr(module, name))
    return layer


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
