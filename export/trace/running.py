"""A model on its example inputs, as PyTorch runs it: what fails here is not torch.export's doing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flora_fx.errors import ExportError

from .refusals import first_line

__all__ = ["is_ours", "run_on", "shapes_of"]

T = TypeVar("T")


def run_on(model: nn.Module, inputs: Mapping[str, Tensor], run: Callable[[], T], remedy: str) -> T:
    """What a model returns for inputs that it is to be captured with.

    Args:
        model: for its name.
        inputs: for their names and shapes.
        run: runs it on them.
        remedy: what to do where it fails.

    Raises:
        ExportError: the model fails. An error that was raised in this package stays what it is.
    """
    try:
        with torch.no_grad():
            return run()
    except ExportError:
        raise
    except Exception as error:  # whatever a model raises
        if is_ours(error):
            raise
        raise ExportError(
            f"{type(model).__name__} does not run on {shapes_of(inputs)}: {type(error).__name__}: {first_line(error)}; "
            f"{remedy}"
        ) from error


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by a line of this package, and not by what that line calls."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name: Any = "" if last is None else last.tb_frame.f_globals.get("__name__")
    package = str(__package__).rpartition(".")[0]  # flora_fx.export
    return str(name).startswith(f"{package}.")


def shapes_of(inputs: Mapping[str, Tensor]) -> str:
    """Names and shapes of inputs.

    >>> shapes_of({"input_ids": torch.ones(2, 7), "pixel_values": torch.ones(2, 3, 8, 8)})
    'input_ids [2, 7], pixel_values [2, 3, 8, 8]'
    """
    return ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
