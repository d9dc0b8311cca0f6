"""Weights in another dtype than the one that they are stored in: cast when somebody reads them, and not kept.

    stored     W [out, in], float16          in a mapped file, or in the user's model
    cast later W [out, in], float32          no memory of its own; whoever computes with it has the numbers meanwhile

It is a tensor like any other to whoever asks for its shape, dtype, device or strides, and to a trace. Operators get
what `numbers` gives; nothing writes to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from flora_fx.internals import pytree, unset_fake_temporarily

__all__ = ["cast_later", "is_cast_later", "numbers", "read_all"]

aten = torch.ops.aten

_NEW = {aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
"""They look at dtype and device alone."""


class _CastLater(Tensor):
    """See `cast_later`."""

    _stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor, dtype: torch.dtype) -> _CastLater:
        like = torch.empty_strided(stored.shape, stored.stride(), dtype=stored.dtype, device="meta").to(dtype)
        found: _CastLater = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype, device=stored.device
        )
        found._stored = stored
        return found

    def __repr__(self) -> str:  # type: ignore[override]  # no contents
        return f"cast_later({list(self.shape)}, {self._stored.dtype} to {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as torch calls it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0]._stored, args[0].dtype)
        kwargs = kwargs or {}
        if func is aten.set_.source_Tensor and isinstance(args[0], cls) and isinstance(args[1], cls):
            args[0]._stored = args[1]._stored  # as PEFT has it, once it has put a weight beside its adapters
            return args[0]
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(given, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise RuntimeError(f"{func} writes to a weight that is cast when it is read; `numbers` gives a copy")
        if func in _NEW:
            args = (torch.empty(0, dtype=args[0].dtype, device=args[0].device), *args[1:])
        args, kwargs = pytree.tree_map_only(cls, numbers, (args, kwargs))
        return func(*args, **kwargs)


def cast_later(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``stored.to(dtype)`` gives, without its memory: whoever reads it reads ``stored``, as it is then.

    Args:
        stored: any tensor.
        dtype: another one than its own; with that one ``stored`` itself is returned.

    >>> weight = cast_later(torch.tensor([1.0, 1.0009765625], dtype=torch.float16), torch.float32)
    >>> weight.dtype, weight * 2
    (torch.float32, tensor([2.0000, 2.0020]))
    """
    return stored if stored.dtype == dtype else _CastLater(stored, dtype)


def is_cast_later(tensor: Tensor) -> bool:
    """Whether a tensor has no memory of its own."""
    return isinstance(tensor, _CastLater)


def numbers(tensor: Tensor) -> Tensor:
    """A tensor's numbers, in its dtype: a copy of what is cast later, any other tensor itself.

    Under a `FakeTensorMode` nothing is read: it would cast what is stored, and make that a fake.

    >>> numbers(cast_later(torch.ones(2, dtype=torch.float16), torch.float64))
    tensor([1., 1.], dtype=torch.float64)
    """
    if not isinstance(tensor, _CastLater):
        return tensor
    with unset_fake_temporarily() as mode:
        if mode is None:
            return tensor._stored.to(tensor.dtype)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def read_all(model: nn.Module | ExportedProgram) -> None:
    """Cast all weights that are cast later: for who runs a model again and again, or needs their memory.

    What is one weight stays one.

    Args:
        model: its parameters, or those in the state dict of a program, are replaced.

    >>> layer = nn.Linear(2, 3).half()
    >>> layer.weight = nn.Parameter(cast_later(layer.weight.detach(), torch.float32), requires_grad=False)
    >>> read_all(layer)
    >>> is_cast_later(layer.weight), layer.weight.dtype
    (False, torch.float32)
    """
    holders: list[dict[str, Any]]
    holders = [model.state_dict] if isinstance(model, ExportedProgram) else [m._parameters for m in model.modules()]
    made: dict[int, nn.Parameter] = {}
    for holder in holders:
        for name, weight in holder.items():
            if isinstance(weight, _CastLater):
                if id(weight) not in made:
                    made[id(weight)] = nn.Parameter(numbers(weight), requires_grad=False)
                holder[name] = made[id(weight)]
