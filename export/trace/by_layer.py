"""Capture a decoder whose layers are alike: one of each kind is traced, the others are written after it.

torch.export takes the same time for every layer, with symbolic sizes half a second. What a layer computes is seen by
running the model once; layers of one kind are those for which that is the same, operator by operator, with the same
numbers, and with weights of the same names, shapes and dtypes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from .capture import capture
from .model import private_copy
from .observing import Observed, Tangled, observe
from .refusals import NotCaptured, first_line
from .repeating import repeat_layers
from .shapes_alone import for_shapes

__all__ = ["capture_by_layer", "path_of_layers", "shorten"]

log = logging.getLogger(__name__)


def capture_by_layer(
    module: nn.Module,
    args: tuple[Any, ...],
    shapes: Any,
    shortened: Callable[[str, Sequence[int]], nn.Module],
    rewrite: Callable[[ExportedProgram], None],
) -> ExportedProgram:
    """As `capture`, of one layer of each kind and, beside them, the first, where that is less than all.

    Args:
        module: takes tensors and then a tuple of two tensors a layer; returns a tensor, and then two a layer.
        args: example inputs.
        shapes: their dynamic dimensions.
        shortened: gives the module with some of its layers, by the path of their list and their indices.
        rewrite: is given what was captured, to rewrite in place, before it is written out for all layers.

    Raises:
        NotCaptured: torch.export fails.
    """
    pairs = args[-1]
    path = path_of_layers(module, len(pairs) // 2)
    if path is not None and len(pairs) > 4:
        try:
            return _by_kind(module, args, shapes, path, shortened, rewrite)
        except (Tangled, NotCaptured) as reason:
            log.info("captured with all layers, which takes longer: %s", reason)
    program = capture(module, args, shapes)
    rewrite(program)
    return program


def _by_kind(
    module: nn.Module,
    args: tuple[Any, ...],
    shapes: Any,
    path: str,
    shortened: Callable[[str, Sequence[int]], nn.Module],
    rewrite: Callable[[ExportedProgram], None],
) -> ExportedProgram:
    *single, pairs = args
    full = for_shapes(module, lambda: observe(module, args, path))
    kept, order = _kinds(full)
    if len(kept) == len(full.layers):
        raise Tangled("no two of its layers are alike")
    small = shortened(path, kept)
    fewer = (*single, tuple(pairs[2 * index + which] for index in kept for which in (0, 1)))
    if _observed(module, small, fewer, path) != Observed(full.before, tuple(full.layers[i] for i in kept), full.after):
        raise Tangled("with fewer layers it computes something else")
    *dims, of_pairs = shapes
    short = capture(small, fewer, (*dims, of_pairs[: 2 * len(kept)]))
    rewrite(short)
    return repeat_layers(short, module, args, path, order)


def _observed(module: nn.Module, small: nn.Module, args: tuple[Any, ...], path: str) -> Observed:
    try:
        return for_shapes(module, lambda: observe(small, args, path))  # as all of it is
    except Tangled:
        raise
    except Exception as error:  # whatever a model does that counts its layers
        raise Tangled(f"with fewer layers it does not run ({first_line(error)})") from error


def _kinds(full: Observed) -> tuple[list[int], list[int]]:
    """The first layer, and the first of each kind among the others; and for each layer, which of them it is like."""
    kept, order = [0], [0]
    known: dict[Hashable, int] = {}
    for index, layer in enumerate(full.layers[1:], 1):
        if layer not in known:
            known[layer] = len(kept)
            kept.append(index)
        order.append(known[layer])
    return kept, order


def path_of_layers(module: nn.Module, count: int) -> str | None:
    """Where the list of so many layers is, if there is one such list that is in no other."""
    found = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList) and len(child) == count]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    return outer[0] if len(outer) == 1 else None


def shorten(module: nn.Module, path: str, kept: Sequence[int]) -> nn.Module:
    """A private copy of a module with some of its layers, which are in the list at ``path``; no other is copied.

    The layers are numbered anew, and so is what the config of a transformers model ``module.model`` has once a layer.
    """
    parent, _, name = path.rpartition(".")
    holder, layers = module.get_submodule(parent), module.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    setattr(holder, name, nn.ModuleList(layers[index] for index in kept))
    try:
        private: Any = private_copy(module)
    finally:
        setattr(holder, name, layers)
    _shorten_configs(private.model, len(layers), kept)
    for index, layer in enumerate(private.get_submodule(path)):
        part: Any
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = index
    shortened: nn.Module = private
    return shortened


def _shorten_configs(model: Any, count: int, kept: Sequence[int]) -> None:
    """Of so many layers leave those that are kept: their number, and lists of one entry a layer."""
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        content = vars(config)
        for key, value in content.items():
            if isinstance(value, list | tuple) and len(value) == count:
                content[key] = type(value)(value[index] for index in kept)
        content[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
