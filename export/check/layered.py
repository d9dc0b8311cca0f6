"""A PyTorch model that computes in float32, with the weights of one layer in memory.

A CPU has no fast products of half precision, and a model twice as large as itself need not fit. So every layer gets its
weights, in float32, as it begins, and loses them as it ends; what stands outside of the layers has them throughout.
Several texts go through the layers together: the weights of each are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.storage.casting import numbers
from flora_fx.storage.mapped import give_back

from ..trace.by_layer import path_of_layers
from ..trace.model import private_copy
from .turns import Turns

__all__ = ["Layered", "Run", "in_float32"]


@dataclass(frozen=True)
class Run:
    """A run of a model.

    Attributes:
        run: calls the model once, and gives what is wanted of it.
        begins, ends: called with the number of a layer, before it and behind it.
    """

    run: Callable[[], Tensor]
    begins: Callable[[int], None] = lambda index: None
    ends: Callable[[int], None] = lambda index: None


class Layered:
    """A model whose layers have their weights while they run.

    Attributes:
        model: it.
        layers: how many of them there are; 0 where they were not found.
    """

    def __init__(self, model: nn.Module, layers: int) -> None:
        self.model = model
        self.layers = layers
        self._turns = Turns()
        self._runs: Sequence[Run] = ()

    def run(self, runs: Sequence[Run]) -> list[Tensor]:
        """What each of several runs gives. A layer gets its weights once for all of them."""
        if not self.layers:
            return [run.run() for run in runs]
        self._runs = runs
        try:
            return self._turns.run([run.run for run in runs])
        finally:
            self._runs = ()

    def watch(self, layer: nn.Module, index: int, weights: _Weights) -> Iterator[Callable[[], None]]:
        """Hooks around a layer, each told by how it is removed."""

        def begin(*_: Any) -> None:
            if not weights.there:
                weights.put()
            if self._runs:
                self._runs[self._turns.current].begins(index)

        def end(*_: Any) -> None:
            if self._runs:
                self._runs[self._turns.current].ends(index)
            self._turns.pass_on()  # behind it, all runs are
            if weights.there:
                weights.take()
                give_back()

        yield layer.register_forward_pre_hook(begin).remove
        yield layer.register_forward_hook(end).remove


@contextmanager
def in_float32(model: nn.Module, layers: int) -> Iterator[Layered]:
    """A private copy of a model that computes in float32; without memory of its own, but for what is running.

    Args:
        model: as for `private_copy`.
        layers: how many it has. Where no list of so many is found, all weights are there at once.

    >>> model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])).half()
    >>> with in_float32(model, 1) as layered:
    ...     print([(p.dtype, p.untyped_storage().nbytes()) for p in layered.model.parameters()])
    [(torch.float32, 4), (torch.float32, 4)]
    """
    private: Any = private_copy(model)
    if hasattr(private, "config"):
        private.config.dtype = torch.float32
    path = path_of_layers(private, layers)
    listed = [] if path is None else list(private.get_submodule(path).children())
    layered = Layered(private, len(listed))
    rest = _Weights(private)
    with ExitStack() as hooks:
        for index, layer in enumerate(listed):
            own = _Weights(layer)
            rest.leave(own)
            own.take()
            for remove in layered.watch(layer, index, own):
                hooks.callback(remove)
        rest.put()
        give_back()
        yield layered


class _Weights:
    """The floating-point weights of a module, and where they belong.

    Attributes:
        there: whether they are there in float32.
    """

    def __init__(self, module: nn.Module) -> None:
        saved = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        self._places: list[tuple[dict[str, Any], str, Tensor]] = [
            (holder, name, tensor)
            for part in module.modules()
            for holder in (part._parameters, part._buffers)
            for name, tensor in holder.items()
            if tensor is not None and tensor.is_floating_point() and id(tensor) in saved
        ]
        self.there = False

    def leave(self, others: _Weights) -> None:
        """Be no more for what others are for."""
        theirs = {(id(holder), name) for holder, name, _ in others._places}
        self._places = [place for place in self._places if (id(place[0]), place[1]) not in theirs]

    def put(self) -> None:
        """Put them there, in float32; what is one weight stays one."""
        self.there = True
        made: dict[int, Tensor] = {}
        for holder, name, tensor in self._places:
            if id(tensor) not in made:
                made[id(tensor)] = _like(tensor, numbers(tensor.detach()).to(torch.float32))
            holder[name] = made[id(tensor)]

    def take(self) -> None:
        """Leave something of their shapes there that takes no memory."""
        self.there = False
        for holder, name, tensor in self._places:
            holder[name] = _like(
                tensor, torch.zeros((), dtype=torch.float32, device=tensor.device).expand(tensor.shape)
            )


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
