"""Which adapter each row of a batch has, from where it is given to the layers that ask."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flora_fx.errors import AdapterError

__all__ = ["ADAPTER_IDS", "Selection"]

ADAPTER_IDS = "adapter_ids"
"""The input [batch], int64: for each row the number of its adapter, -1 for none."""


class Selection:
    """Holds the ids of one forward while it runs; each thread has its own.

    Under a tracer the ids are an ordinary value of the graph, and so are the masks made of them.

    >>> selection = Selection()
    >>> with selection.of(torch.tensor([1, 0, -1])):
    ...     selection.rows(1, torch.ones(3, 2)).tolist()
    [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    """

    def __init__(self) -> None:
        self._traced: Tensor | None = None
        self._held: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy begins with nothing held

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @contextmanager
    def of(self, ids: Tensor) -> Iterator[None]:
        """For the time of a forward, the ids of its rows.

        Args:
            ids: [batch], int64: the index of each row's adapter, any other number for none.
        """
        self.hold(ids)
        try:
            yield
        finally:
            self.release()

    def hold(self, ids: Tensor) -> None:
        """Begin a forward."""
        if torch.compiler.is_compiling():
            self._traced = ids
        else:
            self._held[threading.get_ident()] = ids

    def release(self) -> None:
        """End it."""
        if torch.compiler.is_compiling():
            self._traced = None
        else:
            self._held.pop(threading.get_ident(), None)

    def rows(self, index: int, value: Tensor) -> Tensor:
        """A value in the rows of one adapter, zero in all others, whatever stands there.

        Args:
            index: of the adapter.
            value: [batch, ...].

        Returns:
            [batch, ...], the value's dtype.

        Raises:
            AdapterError: no forward runs that was given ids, or the value has not one entry for each of them.
        """
        ids = self._traced if torch.compiler.is_compiling() else self._held.get(threading.get_ident())
        if ids is None:
            raise AdapterError(_NO_IDS)
        if value.shape[0] != ids.shape[0]:
            raise AdapterError(
                f"adapter_ids has {ids.shape[0]} entries, and a layer with adapters reads {value.shape[0]} rows. "
                "Give one id for each row of the batch; a model that regroups its rows in front of such a layer "
                "cannot have adapters by row."
            )
        mask = (ids == index).view(-1, *[1] * (value.dim() - 1))
        return torch.where(mask, value, 0)


_NO_IDS = (
    "a layer of a model with adapters by row runs, and no forward that was given adapter_ids does. Call the model "
    "that flora_fx.MixedAdapters made, with adapter_ids; gradient checkpointing, which runs layers again when the "
    "forward is over, has to be compiled (torch.compile) or turned off."
)
