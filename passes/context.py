"""What a pass is, and what it works on.

A pass takes a `Context`, may read the facts that it needs, and returns the fact that it gives. Facts are known by their
type: ``context[Effects]`` is what the pass that gives `Effects` returned. The list of passes is in `pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from flora_fx.config import FuseConfig
from flora_fx.graph.program import Program
from flora_fx.ir import Decline

__all__ = ["Context", "Pass"]

T = TypeVar("T")


class Context:
    """A program on its way through the passes, and what they found out about it.

    Attributes:
        program: the graph, which passes that rewrite change.
        config: the forms that the user asked for.
        declines: what was refused so far, in the order of the passes.
    """

    def __init__(self, program: Program, config: FuseConfig) -> None:
        self.program = program
        self.config = config
        self.declines: list[Decline] = []
        self._facts: dict[type, Any] = {}

    def __getitem__(self, kind: type[T]) -> T:
        """The fact of a type."""
        return self._facts[kind]

    def __contains__(self, kind: type) -> bool:
        return kind in self._facts

    def keep(self, fact: object) -> None:
        """Remember a fact, in the place of one of the same type."""
        self._facts[type(fact)] = fact

    def forget(self, *kinds: type) -> None:
        """Drop facts that a rewrite made untrue; the passes that give them run again where they are needed."""
        for kind in kinds:
            del self._facts[kind]


@dataclass(frozen=True)
class Pass:
    """One step of `flora_fx.fuse`.

    Attributes:
        name: as reports, dumps and ``FLORA_FX_LEAVE_OUT`` know it.
        run: what it does; returns the fact that it gives.
        needs: the types of the facts that it reads.
        gives: the type of the fact that it returns; None for a pass that only rewrites or declines.
        rewrites: whether it may change the graph.
        optional: whether the others do without it: left out, it gives an empty fact.
    """

    name: str
    run: Callable[[Context], Any]
    needs: tuple[type, ...] = ()
    gives: type | None = None
    rewrites: bool = False
    optional: bool = False

    def empty(self) -> Any:
        """What it gives where it is left out."""
        return None if self.gives is None else self.gives()
