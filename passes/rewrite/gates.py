"""Write which tokens low-rank values are for: ``z' = where(mask, factor · z, 0)``, for all of a group's at once.

before                                             after
m_1 = ids == 1    m_2 = ids == 2                   owner = [1, …, 1, 2, …, 2], a number for each column of z
z_1' = where(m_1, z_1, 0)                          z'    = where(ids == owner, [z_1 | z_2], 0)
z_2' = where(m_2, z_2, 0)

Where the masks are no such comparisons of one value they stand beside each other instead. Either is written once for
all groups whose columns are alike; a compiler makes ``owner`` of the column's place, and loads nothing.

Where up-projections become loops, these need not run over the columns of all adapters: each token's are picked.

columns = first(ids) + [0, 1, …]                   z' = where(there, z[columns], 0)
                                                   B' = where(there, B[:, columns], 0)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from flora_fx.graph.examples import same_sizes
from flora_fx.graph.program import Program
from flora_fx.ir import Select
from flora_fx.ops import pick_columns
from flora_fx.passes.plan.layout import Gate

from .written import Written

__all__ = ["GateWriter"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Run:
    """Columns that have one number, or with a width the numbers first, first + 1, … for so many columns each."""

    start: int
    stop: int
    first: float
    width: int = 0


class GateWriter:
    """Writes gates, each behind all that were written before.

    Args:
        program: whose graph is written into.
        written: the record of what is written.
    """

    def __init__(self, program: Program, written: Written) -> None:
        self.program = program
        self.build = program.build
        self.written = written
        self._known: dict[Hashable, Node] = {}

    def write_one(self, value: Node, select: Select) -> Node:
        """A value in the tokens that are selected, zero in the others."""
        mask = self.written.successor(select.mask)
        if select.kept:
            return self.build.call(aten.where.ScalarOther, mask, value, 0)
        return self.build.call(aten.where.ScalarSelf, mask, 0, value)

    def scale(self, z: Node, gates: Sequence[Gate]) -> Node:
        """Values that stand beside each other, each times its factor, rounded once."""
        if all(gate.factor == 1.0 for gate in gates):
            return z
        example, runs = self.program.value(z), _merged(_places(gates, [gate.factor for gate in gates]))
        wide = torch.promote_types(example.dtype, torch.float32)
        factors = self._once((runs, wide), lambda: self._steps(runs, wide, example.device))
        z = self.build.call(self.build.ops.mul, z, factors)
        return z if wide == example.dtype else self.build.cast(z, example.dtype)

    def write(self, z: Node, gates: Sequence[Gate]) -> Node:
        """Values that stand beside each other, each in its tokens, zero in the others."""
        return self.build.call(aten.where.ScalarOther, self._mask(gates, self.program.value(z).device), z, 0)

    def may_pick(self, gates: Sequence[Gate]) -> bool:
        """Whether each token says which of the values that stand beside each other are its own."""
        numbers = {gate.select.choice.number for gate in gates if gate.select.choice}
        return len(numbers) == len(gates) > 1 and self._ids([gate.select for gate in gates]) is not None

    def pick(self, z: Node, up: Node, gates: Sequence[Gate]) -> tuple[Node, Node]:
        """Of values that stand beside each other each token's own, and the columns of a matrix that multiply them.

        Args:
            z: [..., columns].
            up: [out, columns].
            gates: of all of the columns.

        Returns:
            [..., rank], times each one's factor, and [..., out, rank], where rank is the highest; what an adapter does
            not have of it is zero.
        """
        device, rank = self.program.value(z).device, max(gate.rank for gate in gates)
        key = ("columns", *gates)
        columns = self._once((*key, "first"), lambda: self._columns(gates, rank, device))
        there = self._once((*key, "there"), lambda: self.build.call(aten.ge.Scalar, columns, 0))
        columns = self._once((*key, "any"), lambda: self.build.call(aten.clamp.default, columns, 0))
        wide = self.build.call(aten.expand.default, columns, [*self.build.sizes(z)[:-1], rank])
        low = self.build.call(aten.where.ScalarOther, there, self.build.call(aten.gather.default, z, -1, wide), 0)
        if any(gate.factor != 1.0 for gate in gates):
            dtype = torch.promote_types(self.program.value(z).dtype, torch.float32)
            factors = self._once((*key, "factor", dtype), lambda: self._factors(gates, dtype, device))
            low = self.build.call(self.build.ops.mul, low, factors)
        return low, self.build.call(pick_columns, up, columns, there)

    def _factors(self, gates: Sequence[Gate], dtype: torch.dtype, device: torch.device) -> Node:
        """[..., 1]: what each token's adapter is multiplied by."""
        ids = self._grouped([gate.select for gate in gates])
        found = self.build.call(aten.full.default, [1], 1.0, dtype=dtype, device=device)
        for gate in gates:
            if gate.select.choice is not None:
                own = self.build.call(aten.eq.Scalar, ids, gate.select.choice.number)
                found = self.build.call(aten.where.ScalarSelf, own, gate.factor, found)
        return found

    def _columns(self, gates: Sequence[Gate], rank: int, device: torch.device) -> Node:
        """[..., rank]: the columns of each token's adapter, -1 for what it does not have."""
        call, ids = self.build.call, self._grouped([gate.select for gate in gates])
        place = call(aten.arange.default, rank, device=device)
        numbers = [gate.select.choice.number for gate in gates if gate.select.choice is not None]
        found: Node | int = -1
        for run in _merged(_places(gates, numbers), counting=True):
            width = run.width or run.stop - run.start
            count, first = (run.stop - run.start) // width, int(run.first)
            own = call(aten.sub.Tensor, ids, first) if first else ids
            is_own = call(aten.eq.Scalar, own, 0)
            if count > 1:
                is_own = call(aten.logical_and.default, call(aten.ge.Scalar, own, 0), call(aten.lt.Scalar, own, count))
            if width < rank:
                is_own = call(aten.logical_and.default, is_own, call(aten.lt.Scalar, place, width))
            columns = call(aten.add.Tensor, call(aten.add.Tensor, call(aten.mul.Tensor, own, width), place), run.start)
            where = aten.where.self if isinstance(found, Node) else aten.where.ScalarOther
            found = call(where, is_own, columns, found)
        assert isinstance(found, Node)
        return found

    def _mask(self, gates: Sequence[Gate], device: torch.device) -> Node:
        """[..., columns], bool."""
        selects = [gate.select for gate in gates]
        ids = self._ids(selects)
        if ids is None:
            ranks = [gate.rank for gate in gates]
            return self._once((*selects, *ranks), lambda: self._beside(selects, ranks))
        numbers = [select.choice.number for select in selects if select.choice is not None]
        runs = _merged(_places(gates, numbers), counting=True)

        def write() -> Node:
            return self.build.call(aten.eq.Tensor, self._grouped(selects), self._steps(runs, torch.int64, device))

        return self._once((ids, runs, len(self.program.shape(selects[0].mask) or ())), write)

    def _grouped(self, selects: Sequence[Select]) -> Node:
        """The ids that masks compare, in the masks' shape."""
        ids = self._ids(selects)
        assert ids is not None
        value = self.written.successor(ids)
        for _ in range(len(self.program.shape(selects[0].mask) or ()) - len(self.program.shape(ids) or ())):
            value = self.build.call(aten.unsqueeze.default, value, -1)
        return value

    def _ids(self, selects: Iterable[Select]) -> Node | None:
        """The value that all masks compare, if these have its shape, with ones behind it."""
        ids = {select.choice.ids if select.choice else None for select in selects}
        found = ids.pop() if len(ids) == 1 else None
        sizes = None if found is None else self.program.shape(found)
        if found is None or sizes is None:
            return None
        masks = [self.program.shape(select.mask) or () for select in selects]
        alike = all(same_sizes(mask, (*sizes, *[1] * (len(mask) - len(sizes)))) for mask in masks)
        return found if alike else None

    def _beside(self, selects: Sequence[Select], ranks: Sequence[int]) -> Node:
        pieces = []
        for select, rank in zip(selects, ranks, strict=True):
            mask = self.written.successor(select.mask)
            if not select.kept:
                mask = self.build.call(aten.logical_not.default, mask)
            dimensions = len(self.program.shape(mask) or ())
            pieces.append(self.build.call(aten.expand.default, mask, [*[-1] * (dimensions - 1), rank]))
        return self.build.call(self.build.ops.cat, pieces, -1)

    def _steps(self, runs: Sequence[_Run], dtype: torch.dtype, device: torch.device) -> Node:
        """[columns]: the runs' numbers."""
        call, columns = self.build.call, runs[-1].stop
        place = call(aten.arange.default, columns, device=device) if len(runs) > 1 or runs[0].width else None
        value: Node | None = None
        for run in reversed(runs):
            if value is None and not run.width:
                value = call(aten.full.default, [columns], run.first, dtype=dtype, device=device)
                continue
            own: Any = run.first
            if run.width:
                own = call(aten.sub.Tensor, place, run.start) if run.start else place
                own = call(aten.floor_divide.default, own, run.width)
                own = call(aten.add.Tensor, own, run.first) if run.first else own
            if value is not None:
                where = aten.where.self if isinstance(own, Node) else aten.where.ScalarSelf
                own = call(where, call(aten.lt.Scalar, place, run.stop), own, value)
            value = own
        assert value is not None
        return value

    def _once(self, key: Hashable, write: Callable[[], Node]) -> Node:
        """What was written under a key before, or is written now."""
        if key not in self._known:
            self._known[key] = write()
        return self._known[key]


def _places(gates: Sequence[Gate], numbers: Sequence[float]) -> list[_Run]:
    """The columns of each gate, and its number."""
    found: list[_Run] = []
    for gate, number in zip(gates, numbers, strict=True):
        start = found[-1].stop if found else 0
        found.append(_Run(start, start + gate.rank, number))
    return found


def _merged(runs: Sequence[_Run], *, counting: bool = False) -> tuple[_Run, ...]:
    """Neighbours with one number made one; ``counting``: those of one width with one number after the other, too."""
    found: list[_Run] = []
    for run in runs:
        last, width = (found[-1], run.stop - run.start) if found else (run, 0)
        if found and not last.width and last.first == run.first:
            found[-1] = replace(last, stop=run.stop)
        elif (
            found
            and counting
            and (last.width or last.stop - last.start) == width
            and last.first + (last.stop - last.start) // width == run.first
        ):
            found[-1] = replace(last, stop=run.stop, width=width)
        else:
            found.append(run)
    return tuple(found)
