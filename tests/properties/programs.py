"""Programs with adapters in them, as data: what a user's forward does, step by step.

    Program(rows=(2, 3), width=5, matrices=(…), steps=(Project(0, Use(0)), Down(0, Use(1)), Up(1, 0, Use(2), "number")))

is a base, an A and a B: ``y = W x; z = A x; y + 0.7 · B z``. The repr of a program is the program: a failure is
repeated by pasting it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "Branch",
    "Change",
    "Down",
    "Join",
    "Map",
    "Matrix",
    "Program",
    "Project",
    "Step",
    "Up",
    "Use",
    "Value",
    "View",
]


@dataclass(frozen=True)
class Matrix:
    """A weight and perhaps a bias.

    Attributes:
        out, into: its sizes.
        bias: whether it has one.
        columns: stored as [into, out], as transformers' Conv1D does.
        narrow: float32, where the others are float64.
        trains: requires gradients.
        over: the index of an earlier matrix, of the same shape, that it shares memory with.
    """

    out: int
    into: int
    bias: bool = False
    columns: bool = False
    narrow: bool = False
    trains: bool = False
    over: int | None = None


@dataclass(frozen=True)
class Value:
    """What a step gives: a tensor (none while a program is drawn), its shape but for the width, its width."""

    tensor: Any
    rows: tuple[int, ...]
    width: int
    narrow: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows, self.width)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.narrow else torch.float64


@dataclass(frozen=True)
class Use:
    """How a matrix is multiplied with: the form it is written in, and the no-ops that the operand goes through."""

    matrix: int
    form: str = "linear"
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Project:
    """A projection of a value: a base, unless something makes more of it."""

    read: int
    use: Use


@dataclass(frozen=True)
class Down:
    """The first half of an adapter: it gives a low-rank value, not a value."""

    read: int
    use: Use
    activation: str = ""


@dataclass(frozen=True)
class Up:
    """The second half of an adapter: a low-rank value, projected and added to a value."""

    target: int
    low: int
    use: Use
    scale: str = "number"
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Map:
    """A function of one value."""

    read: int
    function: str


@dataclass(frozen=True)
class Join:
    """Two values of one shape, or of the same rows, made one."""

    read: int
    other: int
    function: str


@dataclass(frozen=True)
class View:
    """A value in another form, sharing its memory mostly."""

    read: int
    form: str


@dataclass(frozen=True)
class Change:
    """A value changed in place; nothing new comes of it."""

    read: int
    form: str


@dataclass(frozen=True)
class Branch:
    """``torch.cond`` on a value: a projection with an adapter in one branch, a projection in the other."""

    read: int
    base: int
    down: int
    up: int


Step = Project | Down | Up | Map | Join | View | Change | Branch


@dataclass(frozen=True)
class Program:
    """A forward of two inputs: ``x`` [*rows, width] and ``gate`` [*rows, 1].

    Attributes:
        returns: the values that are returned, by index; ``lows`` and ``deltas`` likewise.
        strided: whether x is a transposed view.
        input_trains: whether x requires gradients.
        training: whether the module is in training mode: its dropout is active then.
    """

    rows: tuple[int, ...]
    width: int
    matrices: tuple[Matrix, ...]
    steps: tuple[Step, ...]
    returns: tuple[int, ...]
    lows: tuple[int, ...] = ()
    deltas: tuple[int, ...] = ()
    strided: bool = False
    input_trains: bool = False
    training: bool = False

    @property
    def ups(self) -> list[tuple[Up, Down]]:
        """The adapters: each up-projection with what it reads."""
        downs = [step for step in self.steps if isinstance(step, Down)]
        return [(step, downs[step.low]) for step in self.steps if isinstance(step, Up)]

    @property
    def permuted(self) -> bool:
        """Whether a value may stand in memory in another order than that of its dimensions."""
        return self.strided or any(isinstance(step, View) and step.form == "transposed" for step in self.steps)

    @property
    def narrow(self) -> bool:
        return any(matrix.narrow for matrix in self.matrices)
