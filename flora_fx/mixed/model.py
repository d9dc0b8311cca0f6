"""`MixedAdapters`: a model with several adapters of which each row of a batch has its own, or none."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import AdapterError

from .layers import MixedFlora, MixedLora
from .selection import Selection

__all__ = ["MixedAdapters"]

_LAYERS = {"lora_A": MixedLora, "flora_A": MixedFlora}
"""By what a layer of PEFT's holds."""


class MixedAdapters(nn.Module):
    """A PEFT model whose rows each have an adapter of their own: what ``adapter_names`` is to PEFT, in one graph.

    ``adapter_ids`` is a tensor, so other ids are no reason to compile anew. The model given stays as it was; its
    parameters are shared, so that an optimizer, `load_state_dict` or a hot swap of it is seen here, and the gradients
    of a batch reach each adapter. What is no tensor (which adapters there are, their scales) is taken as it stands.

    Args:
        model: a PEFT model with LoRA or FFBA adapters, of any ranks, scales and targets. Its active adapters, and
            whether they are disabled, make no difference.
        adapters: the names of those that rows may have, in the order of their ids.

    Attributes:
        adapters: the names.
        model: the model, with a layer for all of them in the place of each of PEFT's.

    Raises:
        TypeError: not a module.
        AdapterError: no adapter is named, or one twice; one is not there; one is merged, or does more than to add
            a low-rank value to layers (DoRA and other variants, modules_to_save, adapters of an embedding).

    >>> import peft
    >>> base = torch.nn.Sequential(torch.nn.Linear(4, 6))
    >>> model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]), adapter_name="sql")
    >>> model.add_adapter("chat", peft.LoraConfig(r=3, target_modules=["0"]))
    >>> mixed, x = MixedAdapters(model, ["sql", "chat"]).eval(), torch.randn(3, 4)
    >>> ids = mixed.ids(["chat", None, "sql"])
    >>> ids.tolist()
    [1, -1, 0]
    >>> expected = model.eval()(x, adapter_names=["chat", "__base__", "sql"])
    >>> torch.testing.assert_close(mixed(x, adapter_ids=ids), expected)
    """

    def __init__(self, model: nn.Module, adapters: Sequence[str]) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"MixedAdapters needs a PEFT model, not {type(model).__name__}")
        _require_names(model, adapters)
        self.adapters = tuple(adapters)
        self.selection = Selection()
        self.model = _copied(model)
        for name, layer in list(_adapted(self.model)):
            _require_plain(name, layer, self.adapters)
            self.model.set_submodule(name, _mixed(layer, self.adapters, self.selection))
        self.train(model.training)

    def forward(self, *args: Any, adapter_ids: Tensor, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            adapter_ids: [batch], int64: for each row the index of its adapter in `adapters`, -1 for none.

        Returns:
            what the model returns. Row by row that is what it returns with that adapter alone.

        Raises:
            AdapterError: ids of another shape or dtype, or out of range (which is not looked at where the call is
                compiled: there such a row has no adapter).
        """
        if not torch.compiler.is_compiling():
            self._require_ids(adapter_ids)
        self.selection.hold(adapter_ids)
        try:
            return self.model(*args, **kwargs)
        finally:
            self.selection.release()

    def ids(self, names: Sequence[str | None], device: torch.device | str | None = None) -> Tensor:
        """The ids of a batch.

        Args:
            names: one for each row; None for a row without an adapter.
            device: where the ids are to be.

        Returns:
            [batch], int64.

        Raises:
            AdapterError: a name is none of `adapters`.
        """
        index: dict[str | None, int] = {name: i for i, name in enumerate(self.adapters)}
        index[None] = -1
        if unknown := [name for name in names if name not in index]:
            raise AdapterError(f"there is no adapter {unknown[0]!r} here; it must be None or {_or(self.adapters)}")
        return torch.tensor([index[name] for name in names], dtype=torch.int64, device=device)

    def _require_ids(self, ids: Any) -> None:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
            told = f"{ids.dtype} of {ids.dim()} dimensions" if isinstance(ids, Tensor) else type(ids).__name__
            raise AdapterError(f"adapter_ids is a {told}; it must be a tensor [batch] of int64, as ids([...]) makes it")
        if ids.device.type == "cpu" and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < len(self.adapters):
            raise AdapterError(
                f"adapter_ids holds {int(ids.min())} to {int(ids.max())}; there are {len(self.adapters)} adapters, "
                f"whose ids are 0 to {len(self.adapters) - 1}, and -1 for none"
            )


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares all tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    for _, layer in _adapted(model):
        tensors.extend(scale for scale in layer.scaling.values() if isinstance(scale, Tensor))
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of PEFT's, with their names."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # whoever made a PEFT model has loaded it
    if tuners is not None:
        yield from (
            (name, module) for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)
        )


def _mixed(layer: Any, adapters: tuple[str, ...], selection: Selection) -> nn.Module:
    kind = next(kind for held, kind in _LAYERS.items() if hasattr(layer, held))
    return kind(layer, adapters, selection)


def _require_names(model: nn.Module, adapters: Sequence[str]) -> None:
    known = {name for _, layer in _adapted(model) for held in layer.adapter_layer_names for name in _held(layer, held)}
    if not known:
        raise AdapterError(
            f"{type(model).__name__} has no adapters; give it those first, with peft.get_peft_model or "
            "peft.PeftModel.from_pretrained, one name each"
        )
    if isinstance(adapters, str) or not adapters or len(set(adapters)) != len(adapters):
        raise AdapterError(f"adapters is {adapters!r}; it must be different names among {_or(sorted(known))}")
    if unknown := [name for name in adapters if name not in known]:
        raise AdapterError(f"the model has no adapter {unknown[0]!r}; it has {_or(sorted(known))}")
    for name, module in model.named_modules():
        saved = getattr(module, "_adapters", ())  # PEFT's modules_to_save and trainable_token_indices
        if hasattr(module, "original_module") and (own := [one for one in adapters if one in saved]):
            raise AdapterError(
                f"adapter {own[0]!r} has a {name} of its own (modules_to_save or trainable_token_indices), which rows "
                "of one batch cannot have. Leave it out of adapters, and serve it alone."
            )


def _require_plain(name: str, layer: Any, adapters: tuple[str, ...]) -> None:
    """Refuse what is more than a low-rank value added to a layer's output."""
    if layer.merged:
        merged = ", ".join(layer.merged_adapters)
        raise AdapterError(f"{name} has the adapter {merged} merged into it; call unmerge_adapter() first")
    if not any(hasattr(layer, held) for held in _LAYERS):
        raise AdapterError(
            f"{name} has adapters of {type(layer).__module__}; rows of one batch can have LoRA or FFBA adapters"
        )
    for one in adapters:
        if not any(one in _held(layer, held) for held in layer.adapter_layer_names):
            continue
        variant = getattr(layer, "lora_variant", {}).get(one)
        what = type(variant).__name__ if variant is not None else type(layer).__name__
        if variant is not None or what in _OTHERS:
            raise AdapterError(
                f"adapter {one!r} is a {what} at {name}, which is more than a low-rank value added to the output of "
                "a layer: rows of one batch cannot have it. Leave it out of adapters, or merge it and serve it alone."
            )


_OTHERS = ("Embedding", "MultiheadAttention", "ParamWrapper")
"""Layers of PEFT's LoRA that compute something else."""


def _held(layer: Any, name: str) -> Any:
    """What a layer holds for its adapters under a name."""
    return getattr(layer, name, {})


def _or(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
