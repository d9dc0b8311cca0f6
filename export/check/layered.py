"""A PyTorch model that computes in float32, with the weights of one layer in memory.

A CPU has no fast products of half precision, and a model twice as large as itself need not fit. So every layer gets its
weights, in float32, as it begins, and loses them as it ends; what stands outside of the layers has them throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.storage.mapped import give_back

from ..trace.by_layer import path_of_layers
from ..trace.model import private_copy

__all__ = ["Layered", "in_float32"]

Hook = Callable[[int], None]


class Layered:
    """A model, and whoever wants to know which of its layers begins and ends.

    Attributes:
        model: it.
        layers: how many of them there are; 0 where they were not found.
        begins, ends: called with the number of a layer; may be set.
    """

    def __init__(self, model: nn.Module, layers: int) -> None:
        self.model = model
        self.layers = layers
        self.begins: Hook = lambda index: None
        self.ends: Hook = lambda index: None


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

            def begin(*_: Any, own: _Weights = own, index: int = index) -> None:
                own.put()
                layered.begins(index)

            def end(*_: Any, own: _Weights = own, index: int = index) -> None:
                layered.ends(index)
                own.take()
                give_back()

            hooks.callback(layer.register_forward_pre_hook(begin).remove)
            hooks.callback(layer.register_forward_hook(end, always_call=True).remove)
        rest.put()
        give_back()
        yield layered


class _Weights:
    """The floating-point weights of a module, and where they belong."""

    def __init__(self, module: nn.Module) -> None:
        saved = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        self._places: list[tuple[dict[str, Any], str, Tensor]] = [
            (holder, name, tensor)
            for part in module.modules()
            for holder in (part._parameters, part._buffers)
            for name, tensor in holder.items()
            if tensor is not None and tensor.is_floating_point() and id(tensor) in saved
        ]

    def leave(self, others: _Weights) -> None:
        """Be no more for what others are for."""
        theirs = {(id(holder), name) for holder, name, _ in others._places}
        self._places = [place for place in self._places if (id(place[0]), place[1]) not in theirs]

    def put(self) -> None:
        """Put them there, in float32; what is one weight stays one."""
        made: dict[int, Tensor] = {}
        for holder, name, tensor in self._places:
            if id(tensor) not in made:
                made[id(tensor)] = _like(tensor, tensor.detach().to(torch.float32))
            holder[name] = made[id(tensor)]

    def take(self) -> None:
        """Leave something of their shapes there that takes no memory."""
        for holder, name, tensor in self._places:
            holder[name] = _like(
                tensor, torch.zeros((), dtype=torch.float32, device=tensor.device).expand(tensor.shape)
            )


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
