"""Rotary embeddings as tables, whose rows GroupQueryAttention can look up itself.

rotary(x, positions) -> cos, sin      ->      rotary_rows(table of cos, table of sin, positions) -> cos, sin
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.decoder_ops import rotary_rows
from flora_fx.internals import unset_fake_temporarily

from .attention import current_run
from .refusals import Unsuited
from .switches import Changing, find_switches, is_rotary, rows_of
from .text_config import max_positions

__all__ = ["switches_of", "tabulate_rotary"]


def tabulate_rotary(model: nn.Module) -> None:
    """Replace the rotary embeddings of a private model by `RotaryTables`.

    Raises:
        Unsuited: their angles depend on the length of the sequence.
    """
    length = max_positions(model)
    for name, module in list(model.named_modules()):
        if is_rotary(module):
            kinds = [value for key, value in vars(module).items() if key.endswith("rope_type")]
            kinds += [kind for value in kinds if isinstance(value, dict) for kind in value.values()]
            if "dynamic" in kinds:
                raise Unsuited("its rotary positions are dynamic: they depend on the length of the sequence")
            if length:
                model.set_submodule(name, RotaryTables(module, length))


class RotaryTables(nn.Module):
    """A rotary embedding as tables of cosines and sines, one pair for each set of further arguments it is called with.

    Where its rows change with the length of a text (LongRoPE), a table has one section for each range of lengths, one
    below the other; the longest row of a batch says which section is looked up, as in transformers.

    Attributes:
        switches: after how many tokens its rows change, whatever it is called with.
    """

    def __init__(self, module: nn.Module, length: int) -> None:
        super().__init__()
        self.module = module
        self.length = length
        self.known: dict[str, _Pair | None] = {}
        self.switches: set[int] = set()

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        key = repr((args, sorted(kwargs.items())))
        if key not in self.known:
            with unset_fake_temporarily():  # of what runs for its shapes this is wanted
                self.known[key] = self.tabulate(torch.zeros(x.shape, dtype=x.dtype, device=x.device), args, kwargs)
        pair = self.known[key]
        if pair is None:
            return self.module(x, position_ids, *args, **kwargs)
        longest = current_run().longest
        if pair.switches and longest is not None:
            position_ids = position_ids + sum(torch.where(longest > switch, switch, 0) for switch in pair.switches)
        cos, sin = (self.get_buffer(f"{which}{pair.name}") for which in ("cos", "sin"))
        return rotary_rows(cos, sin, position_ids, pair.interleaved)

    def tabulate(self, x: Tensor, args: Any, kwargs: Any) -> _Pair | None:
        """Make a pair of tables; None where not just cosines and sines of each position are returned."""
        rotary = rows_of(self.module, x, *args, **kwargs)
        try:
            switches = find_switches(rows_of(self.module, x.float(), *args, **kwargs), self.length)
        except Changing as reason:
            raise Unsuited(str(reason)) from reason
        self.switches |= {*switches}
        parts = [rotary(torch.arange(length)[None]) for length in (*switches, self.length)]
        if not all(isinstance(rows, tuple) and len(rows) == 2 for rows in parts):
            return None
        if not all(table.dim() == 3 and table.shape[0] == 1 for rows in parts for table in rows):
            return None
        rows = [torch.cat(tables, 1)[0] for tables in zip(*parts, strict=True)]
        half = rows[0].shape[-1] // 2
        ways = [(slice(0, half), slice(half, None), False), (slice(0, None, 2), slice(1, None, 2), True)]
        for first, second, interleaved in ways:
            if all(torch.equal(table[:, first], table[:, second]) for table in rows):
                name = f"_{len(self.known)}"
                for which, table in zip(("cos", "sin"), rows, strict=True):
                    self.register_buffer(f"{which}{name}", table[:, first].contiguous(), persistent=False)
                return _Pair(name, interleaved, switches)
        return None


@dataclass(frozen=True)
class _Pair:
    """A table of cosines and a table of sines.

    Attributes:
        name: how the names of their buffers end.
        interleaved: whether neighbours are rotated together, and not the two halves of a head.
        switches: after how many tokens the next section is looked up.
    """

    name: str
    interleaved: bool
    switches: tuple[int, ...]


def switches_of(model: nn.Module) -> tuple[int, ...]:
    """After how many tokens the rotary positions of a model with tables change, in rising order."""
    found = {switch for module in model.modules() if isinstance(module, RotaryTables) for switch in module.switches}
    return tuple(sorted(found))
