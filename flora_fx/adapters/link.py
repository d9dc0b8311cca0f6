"""From where a low-rank value is read to where it is written, within one forward."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from flora_fx.errors import AdapterError

__all__ = ["Link"]


class Link:
    """Carries z from the module that reads to the modules that write.

    Each forward puts one value and takes it as often as there are writers; then it is gone. So a value of an earlier
    forward is never taken for one of this: not by another thread (each has its own), and not by a checkpointed region
    that is run again without the region in which z was read. Under a tracer both ends are in one graph, and z is an
    ordinary value of it.

    Args:
        reader: the name of the module that puts.
        writers: how many modules take.

    >>> link = Link("q_proj", writers=2)
    >>> link.put(torch.ones(1))
    >>> link.take("q_proj").item(), link.take("o_proj").item()
    (1.0, 1.0)
    >>> link.take("o_proj")
    Traceback (most recent call last):
    ...
    flora_fx.errors.AdapterError: o_proj adds what q_proj reads, which has not run before it in this forward. ...
    """

    def __init__(self, reader: str, writers: int) -> None:
        self.reader = reader
        self.writers = writers
        self._traced: Tensor | None = None
        self._left = 0
        self._held: dict[int, tuple[Tensor, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"reader": self.reader, "writers": self.writers}  # a copy begins with nothing held

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def put(self, z: Tensor) -> None:
        """Hold z for this forward's writers."""
        if torch.compiler.is_compiling():
            self._traced, self._left = z, self.writers
        else:
            self._held[threading.get_ident()] = (z, self.writers)

    def take(self, writer: str) -> Tensor:
        """What was put in this forward.

        Raises:
            AdapterError: nothing was.
        """
        if torch.compiler.is_compiling():
            z, left = self._traced, self._left
            if z is None:
                raise AdapterError(self._missing(writer))
            self._left = left - 1
            if left == 1:
                self._traced = None
            return z
        held = self._held.pop(threading.get_ident(), None)
        if held is None:
            raise AdapterError(self._missing(writer))
        z, left = held
        if left > 1:
            self._held[threading.get_ident()] = (z, left - 1)
        return z

    def _missing(self, writer: str) -> str:
        return (
            f"{writer} adds what {self.reader} reads, which has not run before it in this forward. Gradient "
            "checkpointing has to hold both in one region (placement 'cross' reaches into the next layer: turn "
            "checkpointing off there, or use 'block' or 'shared'), and torch.compile has to compile both or neither."
        )
