"""Where rotary positions change for a whole text as it grows: LongRoPE's short and long factors.

    up to n tokens      every token is rotated one way
    with n + 1          every token is rotated another way, those before it, too: keys cached until then mean nothing

What a model is called, or its config, is of no matter: its rotary embedding is asked for the row of one position, in
texts of different lengths.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Changing", "find_switches", "is_rotary", "observed_switches", "rows_of"]

_MOST = 8
"""More than so many, and a text is rotated anew at every length, as with dynamic NTK scaling."""


class Changing(Exception):  # noqa: N818
    """Rotary positions that change with every length: no key can be kept."""


def find_switches(rotary: Callable[[Tensor], Any], length: int) -> tuple[int, ...]:
    """After how many tokens the rows of earlier positions change, in rising order.

    Args:
        rotary: positions [1, n], int64 -> rows [1, n, ...]: cosines and sines, or both in one tensor.
        length: the most tokens that there can be.

    Raises:
        Changing: there are more than a few.

    >>> short, long = torch.tensor([1.0, 0.1]), torch.tensor([0.5, 0.01])
    >>> find_switches(lambda at: ((at[..., None] * (long if at.max() >= 32 else short)).cos(),), 128)
    (32,)
    """
    known: dict[int, list[Tensor]] = {}

    def row(tokens: int) -> list[Tensor]:
        if tokens not in known:
            made = rotary(torch.tensor([[1, tokens - 1]]))
            tables = made if isinstance(made, tuple) else (made,)
            known[tokens] = [table[0, 0] for table in tables if table.shape[:2] == (1, 2)]
        return known[tokens]

    found: list[int] = []
    pending = [(2, length)] if length > 2 else []
    while pending:
        low, high = pending.pop()
        if all(map(torch.equal, row(low), row(high))):
            continue
        if high - low > 1:
            middle = (low + high) // 2
            pending += [(middle, high), (low, middle)]  # the lower half comes first
            continue
        found.append(low)
        if len(found) > _MOST:
            raise Changing(f"its rotary positions change with every length beyond {found[0]}")
    return tuple(found)


@contextmanager
def observed_switches(model: nn.Module, length: int) -> Iterator[set[int]]:
    """The switches of all rotary embeddings that run meanwhile; in the set when the block ends.

    Args:
        model: whatever is run.
        length: the most positions it has; 0 for no end, and then nothing is looked for.
    """
    calls: dict[str, Callable[[Tensor], Any]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str) -> None:
        x, position_ids, *more = inspect.signature(module.forward).bind(*args, **kwargs).args
        if isinstance(x, Tensor) and isinstance(position_ids, Tensor) and position_ids.dim() == 2:
            calls.setdefault(f"{name} {more}", rows_of(module, x.float(), *more))

    found: set[int] = set()
    with ExitStack() as hooks:
        for name, module in model.named_modules() if length else ():
            if is_rotary(module):
                handle = module.register_forward_pre_hook(partial(note, name=name), with_kwargs=True)
                hooks.callback(handle.remove)
        yield found
    for rotary in calls.values():
        with suppress(Changing):  # as transformers has it: cached keys keep the angles that they were cached with
            found.update(find_switches(rotary, length))


def is_rotary(module: nn.Module) -> bool:
    """Whether a module makes rotary positions, as those of transformers do: from a tensor and position ids."""
    named = type(module).__name__.endswith("RotaryEmbedding")
    return named and "position_ids" in inspect.signature(module.forward).parameters


def rows_of(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Callable[[Tensor], Any]:
    """Positions [1, n] -> what a rotary embedding makes of them; by a fresh copy each time: some note what they saw.

    Args:
        module: the embedding.
        x: what else it is given, for its dtype and device.
        args, kwargs: the rest.
    """

    def rows(positions: Tensor) -> Any:
        with torch.no_grad():
            return copy.deepcopy(module)(x, positions.to(x.device), *args, **kwargs)

    return rows
