"""`capture`: a model as a graph that `fuse` takes, called like the model and returning what the model returns."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from .errors import CaptureError

__all__ = ["capture"]


def capture(
    model: nn.Module, *args: Any, dynamic_shapes: Mapping[str, Any] | None = None, **kwargs: Any
) -> fx.GraphModule:
    """Trace a model on example inputs with `torch.export` (non-strict, so that PEFT layers trace as they are).

    Args:
        model: any module that torch.export takes: transformers models, PEFT models, your own.
        args: example positional inputs, as the model is called.
        dynamic_shapes: per argument name, which dimensions vary, as in `torch.export.export`. By default none does:
            the graph takes inputs of the example's shapes.
        kwargs: example keyword inputs.

    Returns:
        a graph module with the model's own parameters (shared, same names), called as ``graph(*args, **kwargs)`` and
        returning the model's own output types.

    Raises:
        TypeError: not a module.
        CaptureError: torch.export could not trace the model.

    >>> import torch
    >>> graph = capture(torch.nn.Linear(3, 2), torch.ones(4, 3), dynamic_shapes={"input": {0: torch.export.Dim.AUTO}})
    >>> graph(torch.ones(7, 3)).shape
    torch.Size([7, 2])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture needs a torch.nn.Module, not {type(model).__name__}")
    _register_caches(model)
    shapes = None if dynamic_shapes is None else _by_parameter(model, args, kwargs, dynamic_shapes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of the model's own deprecated calls
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            return program.module(check_guards=False)
    except Exception as error:
        raise CaptureError(
            f"torch.export could not trace {type(model).__name__}: {error}\n"
            "Remedy: give it example inputs that the model itself accepts; if dynamic_shapes are given, check that "
            "each names an argument and a dimension that really varies."
        ) from error


def _register_caches(model: nn.Module) -> None:
    """KV caches are returned by transformers models; torch.export has to know how to take them apart."""
    if "transformers" in sys.modules:
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

        register_cache_pytrees_for_model(model)


def _by_parameter(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Mapping[str, Any]
) -> dict[str, Any]:
    """One entry per argument that is passed; those that go into ``**kwargs`` under its name, as torch.export wants."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs)
    unknown = set(shapes) - set(bound.arguments) - set(kwargs)
    if unknown:
        raise CaptureError(
            f"dynamic_shapes names {', '.join(sorted(unknown))}, which the example inputs do not have; "
            f"they have {', '.join([*bound.arguments])}"
        )
    result: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            result[name] = {key: shapes.get(key) for key in value}
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            result[name] = shapes.get(name, tuple(None for _ in value))
        else:
            result[name] = shapes.get(name)
    return result
