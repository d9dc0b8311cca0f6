"""That an adapter's weights are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from flora_fx.errors import AdapterError

__all__ = ["check_finite", "check_numbers"]


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuse a weight of an adapter that is not all numbers, in float32 at the latest.

    Args:
        tensor: the weight.
        what: it is, for the message.

    Raises:
        AdapterError: NaN or infinity.
    """
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        raise AdapterError(f"{what} holds NaN or Inf; its training diverged: take an earlier checkpoint")


def check_numbers(tensors: Mapping[str, Tensor], path: Path) -> None:
    """`check_finite` of all in a file.

    Args:
        tensors: by name.
        path: of the file.

    Raises:
        AdapterError: one holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        check_finite(tensor, f"{path}: {name}")
