"""A row of the table: a family, and what becomes of its adapters in each mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flora_fx import Reason

from .adapt import Case

__all__ = ["Fate", "Row", "fates", "no_graph"]


@dataclass(frozen=True)
class Fate:
    """What becomes of a family's adapters in one mode.

    Attributes:
        fused: how many up-projections are written into their projections.
        gemms: GEMMs of all graphs, before and after.
        declines: reasons, each with how often and what is to be said of it.
        why: what is to be said of adapters that are neither fused nor declined, or of these numbers.
        refused: a piece of the message with which torch.export refuses the unfused model.
    """

    fused: int
    gemms: tuple[int, int]
    declines: tuple[tuple[Reason, int, str], ...] = ()
    why: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Row:
    """A family.

    Attributes:
        chapter: under which heading it stands.
        name: of the family.
        given: its model's class and what is special about it.
        build: makes the model with its adapters.
        adapters: how many it has.
        captured: by `flora_fx.capture` and `fuse`.
        compiled: by ``torch.compile(…, backend="flora")``.
        slow: modes that are for `make test-all` only.
        needs: a package without which it is skipped.
        tolerance: of what is compiled, relative to the largest output; more where much is computed in float32.
    """

    chapter: str
    name: str
    given: str
    build: Callable[[], Case]
    adapters: int
    captured: Fate
    compiled: Fate
    slow: tuple[str, ...] = ("captured", "compiled")
    needs: str = ""
    tolerance: float = 1e-10


def fates(fused: int, before: int, after: int, compiled: int) -> tuple[Fate, Fate]:
    """The same adapters of the same GEMMs; the backend has a B each."""
    return Fate(fused, (before, after)), Fate(fused, (before, compiled))


def no_graph(message: str, why: str) -> Fate:
    return Fate(0, (0, 0), why=why, refused=message)
