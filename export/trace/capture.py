"""How `torch.export` is asked for a program."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from flora_fx.errors import require
from flora_fx.internals import exporter

from .refusals import NotCaptured, first_line

__all__ = ["PREFIX", "capture"]

PREFIX = "model."
"""Where wrappers hold the model that they are around; cut off the names of the weights again."""


def capture(wrapper: nn.Module, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """`torch.export.export` with transformers' help.

    Args:
        wrapper: holds the model as ``model``, see `PREFIX`.
        args: example inputs.
        shapes: the dynamic dimensions, as ``torch.export`` takes them.

    Raises:
        NotCaptured: torch.export fails. That the wrapper runs on ``args`` is the caller's to know, see `run_on`.
    """
    with torch.no_grad(), _exportable(), _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between torch and transformers, nothing for users
        try:
            # Deferred: guards such as "length · min(12, 24 · length) is 12 · length" (from strides) are true, but not
            # provable. A false one would be found by the check of the export, which runs other sizes.
            return torch.export.export(
                wrapper,
                args,
                strict=False,
                dynamic_shapes=shapes,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except Exception as error:  # of many kinds
            raise NotCaptured(first_line(error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Before it raises, torch.export logs what went wrong, and prints the graph that it has so far (torch 2.13).

    A logger that was asked for details (``TORCH_LOGS``) gives them.
    """
    named = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    levels = {logger: logger.level for logger in named if logger.getEffectiveLevel() >= logging.WARNING}
    own = vars(exporter())
    own["print"] = lambda *_, **__: None  # of that module alone
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        own.pop("print", None)


@contextmanager
def _exportable() -> Iterator[None]:
    """transformers' own replacements for what cannot be exported, for the time of a trace.

    Read in transformers 5.23: `transformers.exporters` registers them as it is imported.
    """
    require("transformers.exporters.exporter_onnx", "hf")
    patches = require("transformers.exporters.utils", "hf")
    with _applied(patches, "onnx"), _applied(patches, "dynamo"):
        yield


@contextmanager
def _applied(patches: Any, backend: str) -> Iterator[None]:
    """As transformers' ``apply_patches``, which imports every model that it has something for: half a second."""
    here = [
        (holder, attribute, replacement)
        for path, attribute, replacement in patches._PATCHES.get(backend, [])
        if not _is_of_other_model(path) and (holder := patches.import_dotted_path(path, missing_ok=True)) is not None
    ]
    with patches.patch_attributes(here):
        yield


def _is_of_other_model(path: str) -> bool:
    """Whether something is in a file of a model that nobody has imported."""
    found = re.match(r"transformers\.models\.\w+\.\w+", path)
    return found is not None and found[0] not in sys.modules
