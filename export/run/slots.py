"""Which LoRA stands in which slot of a session, and which slot each row of a batch takes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol, TypeAlias

from flora_fx.errors import AdapterError, ExportError

from ..lora.slots import EMPTY, Slot, checked_name

__all__ = ["Adapters", "OneAdapter", "RowAdapters", "Rows", "SlotTable", "without_slots"]

Adapters: TypeAlias = Sequence[str | int | None] | str | int | None
"""For each row the name of a LoRA, or the number of its slot, or None for none of them; one alone is for all rows."""

_BASE = (None, "__base__", -1)
"""What stands for no adapter: ours, PEFT's, the graph's."""


class Rows(Protocol):
    """What adapts the rows of a batch."""

    def slots(self, batch: int) -> list[int]:
        """The slot of each row, -1 for none; an empty list where all rows have the one adapter that there is.

        Raises:
            AdapterError: an adapter that is not there.
            ValueError: another number of rows.
        """

    def state(self, slots: Sequence[int]) -> Hashable:
        """What changes with the adapters in these slots: keys of before are of no use then."""


class OneAdapter:
    """One for all rows.

    Attributes:
        swaps: how often it was replaced.
    """

    def __init__(self) -> None:
        self.swaps = 0

    def slots(self, batch: int) -> list[int]:
        """See `Rows.slots`."""
        return []

    def state(self, slots: Sequence[int]) -> Hashable:
        """See `Rows.state`."""
        return self.swaps


class SlotTable:
    """What stands in each slot.

    Args:
        slots: as they were exported.

    Attributes:
        slots: now.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = list(slots)
        self._versions = [0] * len(self.slots)

    def number(self, slot: int | str) -> int:
        """Of a slot, or of the one where a LoRA of that name stands.

        Raises:
            AdapterError: there is none.
        """
        if isinstance(slot, str):
            names = [found.name for found in self.slots]
            if slot in names and slot:
                return names.index(slot)
            raise AdapterError(f"no slot holds an adapter {slot!r}; {self.told()}")
        if isinstance(slot, bool) or not isinstance(slot, int):
            raise TypeError(f"slot is {slot!r}; it must be the number of a slot, or the name of an adapter")
        if not 0 <= slot < len(self.slots):
            raise AdapterError(f"there is no slot {slot}; {self.told()}")
        return slot

    def place_for(self, name: str, slot: int | str | None) -> int:
        """Where a LoRA of a name is to be put.

        Args:
            name: of the LoRA.
            slot: asked for; None for the one that has the name already, else the first that is empty.

        Raises:
            AdapterError: there is none, or another slot has that name.
        """
        names = [found.name for found in self.slots]
        if slot is None:
            if name in names and name:
                return names.index(name)
            if "" not in names:
                raise AdapterError(
                    f"all slots are taken; pass slot= to replace one, or free one by unload_adapter. {self.told()}"
                )
            number = names.index("")
        else:
            number = self.number(slot)
        checked_name(name, ["" if index == number else found for index, found in enumerate(names)])
        return number

    def put(self, number: int, slot: Slot) -> Slot:
        """Note what stands in a slot from now on; returns what did."""
        before, self.slots[number] = self.slots[number], slot
        self._versions[number] += 1
        return before

    def version(self, number: int) -> int:
        """How often a slot was written; 0 for the slot of those that have none."""
        return 0 if number < 0 else self._versions[number]

    def told(self) -> str:
        """All of them, for messages."""
        return "slots: " + ", ".join(f"{number} {slot.name or '(empty)'}" for number, slot in enumerate(self.slots))

    def taken_by(self, adapter: str | int | None) -> int:
        """The slot of what a row asks for.

        Raises:
            AdapterError: it is not there, or the slot is empty.
        """
        if adapter in _BASE:
            return -1
        assert adapter is not None
        number = self.number(adapter)
        if self.slots[number] == EMPTY:
            raise AdapterError(f"slot {number} is empty; fill it by load_adapter. {self.told()}")
        return number


class RowAdapters:
    """An adapter for each row. Names are looked up as a text begins, or goes on.

    Args:
        table: of the session.
        wanted: by whoever calls.

    Raises:
        AdapterError: what is wanted is not there.
        TypeError: it is no name, number or list of them.
    """

    def __init__(self, table: SlotTable, wanted: Adapters) -> None:
        self._table = table
        alone = wanted is None or isinstance(wanted, str | int)
        self._wanted: tuple[str | int | None, ...] = (wanted,) if alone else tuple(wanted)  # type: ignore[assignment, arg-type]
        self._alone = alone
        for adapter in self._wanted:
            table.taken_by(adapter)

    def slots(self, batch: int) -> list[int]:
        """See `Rows.slots`."""
        if not self._alone and len(self._wanted) != batch:
            raise ValueError(f"adapters has {len(self._wanted)} entries; there are {batch} rows, and each needs one")
        found = [self._table.taken_by(adapter) for adapter in self._wanted]
        return found * batch if self._alone else found

    def state(self, slots: Sequence[int]) -> Hashable:
        """See `Rows.state`."""
        return tuple((slot, self._table.version(slot)) for slot in slots)


def without_slots() -> ExportError:
    """The error of an adapter for each row, or for a slot, where there are none."""
    return ExportError(
        "this export has one adapter for all rows; export the model again with adapters=[…], for one of each row"
    )
