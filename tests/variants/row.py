"""A row of the matrix: a variant, and what becomes of it in each mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flora_fx import Reason

from .build import Case

__all__ = [
    "Fate",
    "Row",
    "declined",
    "fused",
    "in_place",
    "left",
    "made_of",
    "partly",
    "reads_another",
    "refused",
    "unscalable",
]


@dataclass(frozen=True)
class Fate:
    """What becomes of a row's adapters in one mode.

    Attributes:
        fused: how many up-projections are written into their projections.
        gemms: GEMMs of all graphs, before and after; None where PEFT's own graphs are cut in pieces that vary.
        declines: reasons, each with how often and a piece of the detail.
        refused: a piece of the message with which PEFT or torch refuse the unfused model.
        why: for the reader, where no reason says it, or says less.
    """

    fused: int = 0
    gemms: tuple[int, int] | None = None
    declines: tuple[tuple[Reason, int, str], ...] = ()
    refused: str = ""
    why: str = ""

    @property
    def verdict(self) -> str:
        """One word."""
        if self.refused:
            return "no graph"
        if self.fused:
            return "partly" if self.declines or self.why else "fused"
        return "declined" if self.declines else "left"


@dataclass(frozen=True)
class Row:
    """A variant.

    Attributes:
        chapter: under which heading it stands.
        name: what it is called.
        given: what PEFT is given, or what is done.
        build: makes the model.
        captured: by `flora_fx.capture` and `fuse`, in eval mode.
        compiled: by ``torch.compile(…, backend="flora")``, in eval mode.
        trained: by the same, a step of training.
        needs: a package that is not among this project's.
        slow: modes that take seconds, for `make test-all` only.
        tolerance: of outputs and gradients, relative to the largest; models with norms in float32 need more.
    """

    chapter: str
    name: str
    given: str
    build: Callable[[], Case]
    captured: Fate
    compiled: Fate
    trained: Fate
    needs: str = ""
    slow: tuple[str, ...] = ()
    tolerance: float = 1e-12


def fused(count: int, before: int, after: int) -> Fate:
    return Fate(count, (before, after))


def partly(count: int, before: int, after: int, *declines: tuple[Reason, int, str], why: str = "") -> Fate:
    return Fate(count, (before, after), declines, why=why)


def declined(*declines: tuple[Reason, int, str], why: str = "") -> Fate:
    return Fate(declines=declines, why=why)


def left(why: str) -> Fate:
    return Fate(why=why)


def refused(message: str, why: str) -> Fate:
    return Fate(refused=message, why=why)


_NOT_SCALAR = "is not known to be one number, or one per token"


def made_of(count: int, what: str) -> tuple[Reason, int, str]:
    return Reason.NOT_LOW_RANK, count, what


def unscalable(count: int) -> tuple[Reason, int, str]:
    return Reason.SCALE_NOT_SCALAR, count, _NOT_SCALAR


def reads_another(count: int) -> tuple[Reason, int, str]:
    return Reason.READS_ANOTHER_VALUE, count, "no base that could share a pack"


def in_place(count: int) -> tuple[Reason, int, str]:
    return Reason.MUTATED, count, "changed in place"
