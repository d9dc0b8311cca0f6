"""The shapes of what a program computes, without computing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .meanings import BETWEEN, VIEWS, WIDENS
from .programs import Branch, Change, Down, Join, Map, Matrix, Program, Project, Step, Up, Value, View

__all__ = ["State", "trace_shapes"]


def trace_shapes(program: Program) -> tuple[list[Value], list[Value], list[Value]]:
    """The shapes of a program's values, of its low-rank values, and of what its adapters add."""
    state = State(program)
    for step in program.steps:
        state.follow(step)
    return state.values, state.lows, state.deltas


class State:
    """The shapes of what a program has computed so far."""

    def __init__(self, program: Program) -> None:
        self.values = [Value(None, program.rows, program.width)]
        self.lows: list[Value] = []
        self.deltas: list[Value] = []
        self.matrices = program.matrices

    def follow(self, step: Step, matrices: Sequence[Matrix] | None = None) -> None:
        matrices = self.matrices if matrices is None else matrices
        match step:
            case Project(read, use) | Down(read, use):
                matrix = matrices[use.matrix]
                found = replace(self.values[read], width=matrix.out, narrow=matrix.narrow)
                (self.values if isinstance(step, Project) else self.lows).append(found)
            case Up(target, _, use):
                narrow = matrices[use.matrix].narrow
                found = self.values[target]
                self.deltas.append(replace(found, narrow=narrow))
                widened = step.scale in WIDENS and step.scale not in BETWEEN
                stays = (narrow and not widened) or step.scale.startswith("in place")
                self.values.append(replace(found, narrow=found.narrow and stays))
            case Map(read):
                found = self.values[read]
                wide = step.function in ("feature", "gate")  # whose tensors are not narrow
                self.values.append(replace(found, narrow=found.narrow and not wide))
            case Join(read, other, function):
                one, two = self.values[read], self.values[other]
                width = one.width + two.width if function == "cat" else one.width
                self.values.append(replace(one, width=width, narrow=one.narrow and two.narrow))
            case View(read, form):
                shown = VIEWS[form][0](self.values[read])
                assert shown is not None
                self.values.append(shown)
            case Branch(read, base):
                self.values.append(replace(self.values[read], width=matrices[base].out))
            case Change():
                pass
