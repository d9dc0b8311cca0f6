"""Layers that a checkpoint holds quantized: read from its files, and put where the model has linear layers.

While transformers loads the rest, something without a weight stands in their place:

    model.q_proj = Linear  →  _Awaited(bias)  →  from_pretrained  →  QuantizedLinear(codes, bias)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flora_fx.errors import AdapterError, require
from flora_fx.quantized import QuantizedLinear

from .files import weight_files
from .schemes import Scheme, scheme_of
from .wording import examples, shape

__all__ = ["Quantized", "find_quantized"]

_REMEDY = (
    "pass the base in floating point, or one that is stored by GPTQ, AWQ (version GEMM), compressed-tensors "
    "('pack-quantized') or bitsandbytes (4 bits)"
)


def find_quantized(directory: Path, config: Any) -> Quantized | None:
    """The quantized layers of a checkpoint; None where there are none, or transformers has to read them.

    Args:
        directory: of the checkpoint.
        config: of it; it says nothing of the quantization afterwards, where this reads it.

    Raises:
        AdapterError: they are stored in a way that is not read.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    told = settings if isinstance(settings, dict) else settings.to_dict()
    try:
        scheme = scheme_of(told)
    except ValueError as why:
        raise AdapterError(f"{directory}: its quantized layers are not read: {why}; {_REMEDY}") from why
    if scheme is None:
        return None
    del config.quantization_config
    return Quantized(directory, scheme)


class Quantized:
    """The quantized layers of one checkpoint.

    Args:
        directory: of it.
        scheme: how they are stored.

    Raises:
        AdapterError: there are none.
    """

    def __init__(self, directory: Path, scheme: Scheme) -> None:
        self.directory = directory
        self.scheme = scheme
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        for path in weight_files(directory):
            handle = require("safetensors", "hf").safe_open(path, framework="pt")
            self._handles[path] = handle
            self._files.update((key, path) for key in handle.keys())  # noqa: SIM118  no dictionary
        self.layers = sorted({name for key in self._files if (name := scheme.layer(key)) is not None})
        if not self.layers:
            raise AdapterError(f"{directory}: config.json says that it is quantized, and no layer of it is; {_REMEDY}")
        self._places: dict[str, str] = {}

    def check_adapter(
        self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], supplied: Collection[str], path: Path
    ) -> None:
        """Does an adapter need weights in floating point, or bring along what stands in a quantized layer's place?

        Args:
            settings: of the adapter.
            tensors: of it.
            supplied: the names of those that stand in a weight's place, see `whole_weights`.
            path: of them, for messages.

        Raises:
            AdapterError: it does.
        """
        if settings.get("use_dora"):
            raise AdapterError(
                f"{path.parent}: a DoRA takes the norms of its base's weights, which are quantized here; load the base "
                "alone, give it to flora_fx.quantized.dequantize, and load the adapter with "
                "peft.PeftModel.from_pretrained"
            )
        owners = set(self.layers)
        whole = sorted(name for name in supplied if name.rpartition(".")[0] in owners)
        coded = sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point())
        if whole or coded:
            raise AdapterError(
                f"{path}: {len(whole or coded)} tensors are whole weights of layers that the base holds quantized"
                f"{examples(whole or coded)} (modules_to_save); {_REMEDY}"
            )

    def awaiting(self, model_class: Any) -> Any:
        """A class whose models have nothing in the quantized layers' places but the biases."""
        quantized = self

        def initialise(model: Any, *args: Any, **kwargs: Any) -> None:
            model_class.__init__(model, *args, **kwargs)
            quantized._await(model)

        own = {
            "__init__": initialise,
            "__module__": model_class.__module__,
            "__qualname__": model_class.__qualname__,
            "_keys_to_ignore_on_load_unexpected": [
                *(model_class._keys_to_ignore_on_load_unexpected or ()),
                self._pattern(f"{model_class.base_model_prefix}."),
            ],
        }
        return type(model_class.__name__, (model_class,), own)

    def place(self, model: Any) -> None:
        """Put the layers into a model that was loaded without them, and make it one of its own class.

        Raises:
            AdapterError: a layer cannot be held as it is, or is another layer's.
        """
        model.__class__ = type(model).__bases__[0]
        for layer, name in self._places.items():
            awaited = model.get_submodule(name)
            parts = self._parts(layer)
            try:
                weight = self.scheme.read(parts, awaited.columns)
            except KeyError as missing:
                raise AdapterError(
                    f"{self.directory}: {layer} has no {missing.args[0]}; the checkpoint is half written: save or "
                    "download it again"
                ) from missing
            except ValueError as why:
                raise AdapterError(f"{self.directory}: {layer} cannot be held as it is: {why}; {_REMEDY}") from why
            wanted = (awaited.rows, awaited.columns)
            if weight.shape != wanted:
                raise AdapterError(
                    f"{self.directory}: {layer} is {shape(weight.shape)} in the checkpoint and {shape(wanted)} in the "
                    f"{type(model).__name__} that its config.json describes; put the config.json there that was saved "
                    "with these weights"
                )
            found = QuantizedLinear(weight, _bias(awaited, parts, model))
            found.compute_dtype = model.dtype
            model.set_submodule(name, found)
        self._handles.clear()

    def _await(self, model: Any) -> None:
        modules = dict(model.named_modules())
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        tied = getattr(model, "_tied_weights_keys", None) or ()
        shares = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        lost = []
        for layer in self.layers:
            name = next((n for n in (layer, f"{prefix}{layer}", layer.removeprefix(prefix)) if n in modules), None)
            sizes = None if name is None else _sizes(modules[name])
            if name is None or sizes is None:
                lost.append(layer)
                continue
            if shares and f"{name}.weight" in tied:
                raise AdapterError(
                    f"{self.directory}: {layer} is quantized, and by config.json its weight is the embedding's, too "
                    f"(tie_word_embeddings); {_REMEDY}"
                )
            model.set_submodule(name, _Awaited(*sizes, modules[name].bias))
            self._places[layer] = name
        if lost:
            raise AdapterError(
                f"{self.directory}: {len(lost)} quantized layers of the checkpoint are no linear layers of "
                f"{type(model).__name__}{examples(lost)}; {_REMEDY}"
            )

    def _pattern(self, prefix: str) -> str:
        """What the keys of quantized layers match, with and without the model's prefix: one, since there are many."""
        layers = "|".join(re.escape(layer.removeprefix(prefix)) for layer in self.layers)
        return rf"^({re.escape(prefix)})?({layers})\."

    def _parts(self, layer: str) -> dict[str, Tensor]:
        keys = [key for key in self._files if key.startswith(f"{layer}.")]
        return {key.removeprefix(f"{layer}."): self._handles[self._files[key]].get_tensor(key) for key in keys}


class _Awaited(nn.Module):
    """Stands in a quantized layer's place: its sizes, and its bias."""

    bias: nn.Parameter | None

    def __init__(self, rows: int, columns: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.register_parameter("bias", bias)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """out_features and in_features of a linear layer; None of any other."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), Tensor):
        return int(weight.shape[1]), int(weight.shape[0])  # GPT-2 stores its projections transposed
    return None


def _bias(awaited: _Awaited, parts: Mapping[str, Tensor], model: Any) -> nn.Parameter | None:
    """The layer's bias; also one that the checkpoint has for a layer without, where it adds anything."""
    extra = parts.get("bias")
    if awaited.bias is not None or extra is None or not bool(extra.any()):
        return awaited.bias
    return nn.Parameter(extra.to(model.dtype), requires_grad=False)
