"""`capture`: a model as a graph that `fuse` takes, called like the model and returning what the model returns."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import CaptureError
from .mixed.model import MixedAdapters
from .mixed.selection import ADAPTER_IDS
from .ops import autocasts
from .quantized.formats.live import with_quantized_linears
from .storage.module import PLAIN

__all__ = ["CAPTURING", "capture"]

CAPTURING = threading.RLock()
"""Held while torch.export traces: torch 2.13 patches modules and keeps stacks of modes for all threads together."""


def capture(
    model: nn.Module,
    *args: Any,
    dynamic_shapes: Mapping[str, Any] | None = None,
    adapters: Sequence[str] | None = None,
    **kwargs: Any,
) -> fx.GraphModule:
    """Trace a model on example inputs with `torch.export` (non-strict, so that PEFT layers trace as they are).

    Args:
        model: any module that torch.export takes: transformers models, PEFT models, your own.
            Linear layers that bitsandbytes, torchao or compressed-tensors hold quantized are
            `flora_fx.quantized.QuantizedLinear` in the graph, with the same codes; the model keeps its own.
        args: example positional inputs, as the model is called.
        dynamic_shapes: per argument name, which dimensions vary, as in `torch.export.export`. By default none does:
            the graph takes inputs of the example's shapes, and raises a RuntimeError that says so on others.
        adapters: names of adapters of a PEFT model (see `MixedAdapters`). The graph has one input more then,
            ``adapter_ids``, [batch] of int64: for each row the place of its adapter among these, -1 for none. An
            example of it need not be given; it varies with the first dimension of the first tensor.
        kwargs: example keyword inputs.

    Returns:
        a graph module with the model's own parameters (shared, same names), called as ``graph(*args, **kwargs)`` and
        returning the model's own output types.

    Raises:
        TypeError: not a module.
        CaptureError: torch.export could not trace the model.
        AdapterError: rows of one batch cannot have these adapters; the message says which and why.

    Threads take turns. While one of them captures, no other may call modules: torch's tracers (2.13) patch
    ``nn.Module.__call__`` for all threads.

    >>> import torch
    >>> graph = capture(torch.nn.Linear(3, 2), torch.ones(4, 3), dynamic_shapes={"input": {0: torch.export.Dim.AUTO}})
    >>> graph(torch.ones(7, 3)).shape
    torch.Size([7, 2])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture needs a torch.nn.Module, not {type(model).__name__}")
    _register_caches(model)
    copied = with_quantized_linears(model)
    model = copied.model
    mixed = None if adapters is None else MixedAdapters(model, adapters)
    if mixed is not None:
        model = mixed.model
        kwargs = {ADAPTER_IDS: _example_ids(args, kwargs), **kwargs}
        kwargs[ADAPTER_IDS] = kwargs.pop(ADAPTER_IDS)  # the last input
    names = _argument_names(model, args, kwargs)
    if unknown := set(dynamic_shapes or {}) - set(names):
        raise CaptureError(
            f"dynamic_shapes names {', '.join(sorted(unknown))}, which the example inputs do not have; "
            f"they have {', '.join(names)}"
        )
    if mixed is not None and dynamic_shapes is not None:
        dynamic_shapes = {ADAPTER_IDS: _batch_of(names, args, kwargs, dynamic_shapes), **dynamic_shapes}
    shapes = None if dynamic_shapes is None else {name: dynamic_shapes.get(name) for name in names}
    try:
        with (
            CAPTURING,
            _attributes_kept(model),
            warnings.catch_warnings(),
            _explicit_signature(model, names, len(args), mixed),
        ):
            warnings.simplefilter("ignore")  # tracing warns of the model's own deprecated calls
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            graph = program.module(check_guards=False)
    except Exception as error:
        remedy = copied.told() or (
            "give it example inputs that the model itself accepts; if dynamic_shapes are given, check that each names "
            "an argument and a dimension that really varies."
        )
        raise CaptureError(f"torch.export could not trace {type(model).__name__}: {error}\nRemedy: {remedy}") from error
    devices = {"cpu", *(tensor.device.type for tensor in model.state_dict().values())}
    graph.meta[PLAIN] = not any(map(autocasts, devices))
    return graph


def _register_caches(model: nn.Module) -> None:
    """KV caches are returned by transformers models; torch.export has to know how to take them apart."""
    if sys.modules.get("transformers") is not None:
        with contextlib.suppress(ImportError):  # before 5.23 it has no exporters, and its models other caches
            from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

            register_cache_pytrees_for_model(model)


def _argument_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """The names of the arguments that are passed, one each: also of those that end up in ``*args``."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in positional]
    return [known[i] if i < len(known) else f"args_{i}" for i in range(len(args))] + list(kwargs)


def _example_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """No adapter for any row of the first tensor among the example inputs."""
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
    if first is None:
        raise CaptureError(f"no example input is a tensor with a batch: give an example of {ADAPTER_IDS}, too")
    return torch.full((first.shape[0],), -1, dtype=torch.int64, device=first.device)


def _batch_of(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Mapping[str, Any]
) -> Any:
    """How the ids' dimension varies: as the first one of the first tensor."""
    values = [*args, *(kwargs[name] for name in names[len(args) :])]
    first = next((name for name, value in zip(names, values, strict=True) if isinstance(value, Tensor)), ADAPTER_IDS)
    shape = dynamic_shapes.get(first)
    batch = shape.get(0) if isinstance(shape, Mapping) else shape[0] if shape else None
    return None if batch is None else {0: batch}


@contextlib.contextmanager
def _explicit_signature(
    model: nn.Module, names: Sequence[str], positional: int, mixed: MixedAdapters | None
) -> Iterator[None]:
    """For the time of a trace, a forward that names what is passed, and hands ids to the layers with adapters.

    PeftModel's is ``forward(*args, **kwargs)``, for which torch.export 2.13 contradicts itself on dynamic shapes.
    """
    original, own = model.forward, model.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(names, args, strict=False))
        given = [named.pop(name) for name in names[:positional] if name in named]
        if mixed is None:
            return original(*given, **named, **kwargs)
        named |= kwargs
        with mixed.selection.of(named.pop(ADAPTER_IDS)):
            return original(*given, **named)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Leave each module the dicts and lists that it has.

    torch.export (2.13) undoes what a trace assigned by giving each module copies of its attributes. PEFT and
    transformers share one dict of configurations, and would each have their own from then on: an adapter that is added
    later is missing in one.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for own, kept in before:
            own.update({name: _put_back(value, own[name]) for name, value in kept.items() if name in own})


def _put_back(kept: Any, copy: Any) -> Any:
    """The object that there was, with the content that there was: in a container a trace may have left something."""
    if kept is not copy and type(kept) is type(copy):
        if isinstance(kept, dict):
            content = {key: _put_back(kept.get(key, value), value) for key, value in copy.items()}
            kept.clear()
            kept.update(content)
        elif isinstance(kept, list):
            kept[:] = [_put_back(kept[i], value) if i < len(kept) else value for i, value in enumerate(copy)]
    return kept
